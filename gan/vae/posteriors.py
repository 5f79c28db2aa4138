"""Approximate posteriors q(z | x): how latents are drawn for an image, and how dense they lie.

Each is a module that is called with standard normal noise [k, N, m], m its `noise`, features h of the images [N, F],
and the model's log p(x, z) as a function of z. It returns latents z [k, N, d] and log q [k, N], so that
log p(x, z) - log q is a log weight (`gan.vae.bounds`). Where the posterior has variables besides z, what they add is
part of log q, and the weights' mean is p(x) all the same.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gan.errors import UserError
from gan.layers import Linear
from gan.methods.rows import Entry
from gan.vae.flows import FLOWS
from gan.vae.gaussians import normal_divergence, normal_log_density
from gan.vae.groups import Grouped

Joint = Callable[[Tensor], Tensor]  # z [k, N, d] -> log p(x, z) [k, N]


def stopped_log_density(posterior: nn.Module, z: Tensor, h: Tensor) -> Tensor:
    """log q(z | x) [k, N], whose gradient reaches z only: the posterior's parameters count as constants."""
    constants = {name: p.detach() for name, p in posterior.named_parameters()}
    return functional_call(posterior, constants, (z, h.detach()), {"density": True})


class Flowed(nn.Module):
    """A Gaussian with a mean and a variance for each coordinate, moved by the layers of a flow, if there are any."""

    def __init__(self, features: int, d: int, flow: str = "", layers: int = 0):
        super().__init__()
        self.noise = d
        self.moments = Linear(features, 2 * d)
        self.layers = nn.ModuleList(FLOWS[flow](features, d) for _ in range(layers))

    @property
    def has_density(self) -> bool:
        """Can its density be told of any latents, not only of those that it drew?"""
        return all(hasattr(layer, "inverse") for layer in self.layers)

    def divergence(self, h: Tensor) -> Tensor | None:
        """KL(q || N(0, I)) [N]; None where it is known by draws only."""
        return None if self.layers else normal_divergence(*self.moments(h).chunk(2, -1))

    def forward(
        self, z: Tensor, h: Tensor, joint: Joint | None = None, density: bool = False
    ) -> tuple[Tensor, Tensor] | Tensor:
        """z: noise, from which latents are made, or with `density` latents, whose log density is returned."""
        if density:
            return self.log_density(z, h)
        mean, log_variance = self.moments(h).chunk(2, -1)
        noise = z
        z = mean + (log_variance / 2).exp() * noise
        log_q = normal_log_density(noise) - log_variance.sum(-1) / 2
        for layer in self.layers:
            z, log_det = layer(z, h)
            log_q = log_q - log_det
        return z, log_q

    def log_density(self, z: Tensor, h: Tensor) -> Tensor:
        """log q(z | x) of latents [k, N, d] -> [k, N]."""
        total = torch.zeros_like(z[..., 0])
        for layer in reversed(self.layers):
            z, log_det = layer.inverse(z, h)  # type: ignore[operator]
            total = total - log_det
        return total + normal_log_density(z, *self.moments(h).chunk(2, -1))


def leapfrog(
    z: Tensor, momentum: Tensor, slope: Callable[[Tensor], Tensor], step: Tensor, steps: int, mass: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """So many steps of the leapfrog integrator, which keeps volume -> (z, momentum) (Neal 2011, eq. 5.18 to 5.20).

    slope: z -> the gradient of the log density there. step, mass: what broadcasts with z, as [d].
    """
    momentum = momentum + step / 2 * slope(z)
    for i in range(steps):
        z = z + step * momentum / mass
        momentum = momentum + step * (1 if i < steps - 1 else 0.5) * slope(z)
    return z, momentum


class Hamiltonian(nn.Module):
    """A Gaussian whose draws then move along log p(x, z), by Hamiltonian dynamics with a random momentum.

    Salimans et al. 2015, section 3. The momentum at the end is modeled as it was drawn, by N(0, mass). So the log
    weight is log p(x, z) + log N(momentum at the end) - log q(first z) - log N(momentum at the start), as volume is
    kept. Mass and step size of each coordinate are learned.
    """

    has_density = False

    def __init__(self, features: int, d: int, steps: int):
        super().__init__()
        self.noise = 2 * d
        self.start = Flowed(features, d)
        self.steps = steps
        self.log_step = nn.Parameter(torch.full((d,), math.log(0.05)))
        self.log_mass = nn.Parameter(torch.zeros(d))

    def forward(self, noise: Tensor, h: Tensor, joint: Joint) -> tuple[Tensor, Tensor]:
        first, start = noise.chunk(2, -1)
        mass = self.log_mass.exp()
        momentum = start * mass.sqrt()
        z, log_q = self.start(first, h)

        def slope(z: Tensor) -> Tensor:
            with torch.enable_grad():
                z = z if z.requires_grad else z.detach().requires_grad_()
                return torch.autograd.grad(joint(z).sum(), z, create_graph=self.training)[0]

        z, end = leapfrog(z, momentum, slope, self.log_step.exp(), self.steps, mass)
        return z, log_q + normal_log_density(momentum, 0, self.log_mass) - normal_log_density(end, 0, self.log_mass)


class Auxiliary(nn.Module):
    """A mixture of Gaussians: a variable a is drawn first, and z given a (Maaløe et al. 2016, eq. 3 to 6).

    A second network guesses a from z and the image, r(a | z, x), and the log weight is
    log p(x, z) + log r(a | z, x) - log q(a | x) - log q(z | a, x).
    """

    has_density = False

    def __init__(self, features: int, d: int, size: int):
        super().__init__()
        self.noise = size + d
        self.size = size
        self.first = Flowed(features, size)
        self.then = nn.Sequential(Linear(features + size, features, activate=True), Linear(features, 2 * d))
        self.guess = nn.Sequential(Linear(features + d, features, activate=True), Linear(features, 2 * size))

    def forward(self, noise: Tensor, h: Tensor, joint: Joint | None = None) -> tuple[Tensor, Tensor]:
        for_a, for_z = noise.split([self.size, noise.shape[-1] - self.size], -1)
        a, log_q = self.first(for_a, h)
        mean, log_variance = joined(self.then, a, h).chunk(2, -1)
        z = mean + (log_variance / 2).exp() * for_z
        log_q = log_q + normal_log_density(for_z) - log_variance.sum(-1) / 2
        return z, log_q - normal_log_density(a, *joined(self.guess, z, h).chunk(2, -1))


def joined(network: nn.Module, z: Tensor, h: Tensor) -> Tensor:
    """A network of latents [k, N, d] beside their images' features [N, F] -> [k, N, outputs]."""
    both = torch.cat([z, h.expand(*z.shape[:-1], -1)], -1)
    return network(both.flatten(0, 1)).unflatten(0, z.shape[:2])


class Implicit(nn.Module):
    """Latents made by a network from noise and the image, whose density nobody knows (Mescheder et al. 2017).

    `log_q` is an estimate: the density of a Gaussian with the mean and the variance of some draws, which count as
    constants (adaptive contrast, section 3.2), plus what an adversary says of the latents' ratio to it. The adversary
    sees latents in units of that Gaussian, so that it has to tell them from N(0, I).
    """

    has_density = False
    draws = 16  # by which mean and variance are estimated

    def __init__(self, features: int, d: int, size: int):
        super().__init__()
        self.noise = size * (1 + self.draws)
        self.size = size
        self.network = nn.Sequential(
            Linear(features + size, features, activate=True),
            Linear(features, features, activate=True),
            Linear(features, d),
        )
        self.adversary = Adversary(features, d)

    def forward(self, noise: Tensor, h: Tensor, joint: Joint | None = None) -> tuple[Tensor, Tensor]:
        z, whitened, log_r = self.contrast(noise, h)
        constants = {name: p.detach() for name, p in self.adversary.named_parameters()}  # it has a loss of its own
        return z, functional_call(self.adversary, constants, (whitened, h.detach())) + log_r

    def contrast(self, noise: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [k, N, d], the same in units of the Gaussian, and their log density under it [k, N]."""
        first, others = noise.split([self.size, self.size * self.draws], -1)
        z = joined(self.network, first, h)
        with torch.no_grad():
            more = others[0].unflatten(-1, (self.draws, self.size)).movedim(1, 0)
            seen = joined(self.network, more, h)
            mean = seen.mean(0)
            deviation = seen.std(0).clamp(min=1e-4)
        whitened = (z - mean) / deviation
        return z, whitened, normal_log_density(z, mean, 2 * deviation.log())


class Adversary(nn.Module):
    """(Latents [k, N, d], features [N, F]) -> how much likelier they come from the posterior than from N(0, I), as a
    logarithm: [k, N]."""

    def __init__(self, features: int, d: int):
        super().__init__()
        self.network = nn.Sequential(
            Linear(features + d, features, activate=True),
            Linear(features, features, activate=True),
            Linear(features, 1),
        )

    def forward(self, z: Tensor, h: Tensor) -> Tensor:
        return joined(self.network, z, h).squeeze(-1)


def at_least_one(name: str, value: int) -> int:
    """The value. Raises UserError below 1."""
    if value < 1:
        raise UserError(f"{name} must be at least 1")
    return value


def _flow(summary: str, flow: str, layers: int) -> Entry[nn.Module]:
    def make(features: int, d: int, group: int, layers: int) -> nn.Module:
        return Flowed(features, d, flow, at_least_one("layers", layers))

    return Entry(summary, make, {"layers": layers})


# Made for (features of the images, numbers in a latent, images in a coupling group).
POSTERIORS: dict[str, Entry[nn.Module]] = {
    "diagonal": Entry(
        "a Gaussian with independent coordinates (Kingma & Welling 2014, eq. 9)",
        lambda features, d, group: Flowed(features, d),
    ),
    "planar": _flow("that, bent along directions (Rezende & Mohamed 2015, eq. 10)", "planar", 8),
    "householder": _flow("that, reflected: any Gaussian (Tomczak & Welling 2016, eq. 8)", "householder", 8),
    "iaf": _flow("that, through autoregressive gates (Kingma et al. 2016, eq. 10)", "iaf", 4),
    "coupling": _flow("that, each half moved by the other (Dinh et al. 2015, eq. 11)", "coupling", 4),
    "hamiltonian": Entry(
        "that, moved along log p(x, z) (Salimans et al. 2015, section 3)",
        lambda features, d, group, steps: Hamiltonian(features, d, at_least_one("steps", steps)),
        {"steps": 4},
    ),
    "auxiliary": Entry(
        "a mixture of Gaussians, by a variable that is drawn first (Maaløe et al. 2016, eq. 3)",
        lambda features, d, group, size: Auxiliary(features, d, at_least_one("size", size)),
        {"size": 16},
    ),
    "implicit": Entry(
        "draws of a network, their density judged by an adversary (Mescheder et al. 2017, section 3)",
        lambda features, d, group, size: Implicit(features, d, at_least_one("size", size)),
        {"size": 16},
    ),
    "grouped": Entry(
        "the first numbers are the same for all images of a class in a coupling group (Bouchacourt et al. 2018, eq. 4)",
        lambda features, d, group, content: Grouped(features, d, content, group),
        {"content": 8},
    ),
}
