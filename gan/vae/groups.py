"""Groups of images that share something, such as their class: content is one latent for all of a group, style one for
each image (ML-VAE, Bouchacourt et al. 2018)."""

import torch
from torch import Tensor, nn

from gan.errors import UserError
from gan.layers import Linear
from gan.vae.gaussians import normal_divergence, normal_log_density, product_of_gaussians


class Grouped(nn.Module):
    """Of each `size` consecutive images the first `content` numbers of the latent are the same: they are drawn from the
    product of what each image says. The others are the image's own.

    Each image bears its share of the content's divergence, so that it counts once per group.
    """

    has_density = False

    def __init__(self, features: int, d: int, content: int, size: int):
        super().__init__()
        if not 0 < content < d:
            raise UserError(f"content={content} must leave some of the latent's {d} numbers to style, and be positive")
        self.noise = d
        self.content = content
        self.size = size
        self.moments = Linear(features, 2 * d)

    def split(self, h: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(mean, log variance) of each group's content [N / size, content], and of each image's style [N, ...]."""
        mean, log_variance = self.moments(h).chunk(2, -1)
        sizes = [self.content, mean.shape[-1] - self.content]
        content_mean, style_mean = mean.split(sizes, -1)
        content_log_variance, style_log_variance = log_variance.split(sizes, -1)
        return self.accumulate(content_mean, content_log_variance), (style_mean, style_log_variance)

    def accumulate(self, mean: Tensor, log_variance: Tensor) -> tuple[Tensor, Tensor]:
        """What the images of each group say of its content together: [N, content] each -> [N / size, content] each."""
        members = [x.unflatten(0, (-1, self.size)).movedim(1, 0) for x in (mean, log_variance)]
        return product_of_gaussians(*members)

    def divergence(self, h: Tensor) -> Tensor:
        """KL(q || N(0, I)) [N]."""
        content, style = self.split(h)
        return normal_divergence(*style) + normal_divergence(*content).repeat_interleave(self.size) / self.size

    def forward(self, noise: Tensor, h: Tensor, joint: object = None) -> tuple[Tensor, Tensor]:
        """The density is of the whole latent, as if its content were the image's own: it makes no bound."""
        content, (style_mean, style_log_variance) = self.split(h)
        mean = torch.cat([content[0].repeat_interleave(self.size, 0), style_mean], -1)
        log_variance = torch.cat([content[1].repeat_interleave(self.size, 0), style_log_variance], -1)
        shared = noise[:, :: self.size, : self.content].repeat_interleave(self.size, 1)
        noise = torch.cat([shared, noise[..., self.content :]], -1)
        z = mean + (log_variance / 2).exp() * noise
        return z, normal_log_density(z, mean, log_variance)
