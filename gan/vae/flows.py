"""Normalizing flows: invertible maps of latents whose volume change is known, with parameters that depend on the image.

Each layer maps latents [k, N, d] and features of the images [N, F] to new latents and the logarithm of |det| of the
Jacobian, [k, N]. Layers that can be inverted have `inverse`, which returns the old latents and the same logarithm.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization

from gan.errors import UserError
from gan.layers import Linear

OPEN_GATE = 1.5  # the bias of a gate: z passes nearly unchanged at first (Kingma et al. 2016, section 4)
MOST_SCALING = 2.0  # bound of the logarithm of a factor in a coupling layer
TINY = 1e-12  # squared lengths below count as this
HIDDEN = (64, 64)  # units of the networks inside of autoregressive and coupling layers


def planar(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """z + u' tanh(w·z + b), and log|det| (Rezende & Mohamed 2015, eq. 10 to 12 and appendix A.1).

    u' = u + (m(w·u) - w·u) w / |w|², m(a) = softplus(a) - 1, so that w·u' >= -1 and the map can be inverted.
    z: [..., d]; u, w: [..., d]; b: [...].
    """
    along = (w * u).sum(-1, keepdim=True)
    norm = w.square().sum(-1, keepdim=True)
    u = u + (F.softplus(along) - 1 - along) * w / norm.clamp(min=TINY)
    bent = torch.tanh((w * z).sum(-1) + b)
    # 1 + w·u' is softplus(w·u). As 1 plus the product it would be rounded, to 0 and below where the map contracts most.
    share = norm / norm.clamp(min=TINY)  # 1, but for a w so short that u' keeps some of u
    slope = (share * F.softplus(along) + (1 - share) * (1 + along)).squeeze(-1)
    log_det = torch.log(bent.square() + (1 - bent.square()) * slope).expand(z.shape[:-1])
    return z + u * bent.unsqueeze(-1), log_det


def householder(z: Tensor, v: Tensor) -> Tensor:
    """z - 2 v (v·z) / |v|², a reflection, whose |det| is 1 (Tomczak & Welling 2016, eq. 8). z, v: [..., d]."""
    return z - 2 * v * (v * z).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp(min=1e-12)


def gated(z: Tensor, mean: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """s z + (1 - s) mean with s = sigmoid(gate), and log|det| = sum log s (Kingma et al. 2016, eq. 11 to 14).

    Mean and gate of a coordinate depend on the coordinates before it only. All [..., d].
    """
    s = gate.sigmoid()
    return s * z + (1 - s) * mean, F.logsigmoid(gate).sum(-1)


class Planar(nn.Module):
    """One bend along a direction."""

    def __init__(self, features: int, d: int):
        super().__init__()
        self.parameters_of = Linear(features, 2 * d + 1)
        self.d = d
        with torch.no_grad():
            self.parameters_of.weight[:d] = 0  # u: next to no bend at first

    def forward(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        u, w, b = self.parameters_of(h).split([self.d, self.d, 1], -1)
        return planar(z, u, w, b.squeeze(-1))


class Householder(nn.Module):
    """One reflection. d of them make any rotation, so that a Gaussian with d variances becomes any Gaussian.

    At first nearly the same for all images: with directions that depend on the image as much as on chance, means are
    scrambled, and an MNIST VAE of 400 kimg was 2 nats worse for its reflections than without.
    """

    def __init__(self, features: int, d: int):
        super().__init__()
        self.direction = Linear(features, d)
        with torch.no_grad():
            self.direction.weight.mul_(0.1)
            self.direction.bias.normal_()

    def forward(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return householder(z, self.direction(h)), z.new_zeros(z.shape[:-1])

    def inverse(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(z, h)


class InverseAutoregressive(nn.Module):
    """A gate for each coordinate, by a network in which it depends on those before it; then their order is reversed.

    Sampling is one pass of the network, the inverse is d of them.
    """

    def __init__(self, features: int, d: int):
        super().__init__()
        with torch.device("cpu"):  # also where sizes alone are asked for: the masks are worked out
            earlier = torch.ones(d, d, dtype=torch.bool).tril(-1)
            sees = torch.cat([earlier, torch.ones(d, features, dtype=torch.bool)], 1)
            self.network = _zuko().nn.MaskedMLP(sees.repeat(2, 1), HIDDEN, activation=nn.ELU)
        equalize(self.network)
        for layer in self.network:  # masks are no part of what is saved: they follow from the sizes
            if hasattr(layer, "mask"):
                layer.register_buffer("mask", layer.mask, persistent=False)

    def _mean_and_gate(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        mean, gate = self.network(torch.cat([z, h.expand(*z.shape[:-1], -1)], -1)).chunk(2, -1)
        return mean, gate + OPEN_GATE

    def forward(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = gated(z, *self._mean_and_gate(z, h))
        return z.flip(-1), log_det

    def inverse(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        target = z.flip(-1)
        old = torch.zeros_like(target)
        for i in range(target.shape[-1]):
            mean, gate = self._mean_and_gate(old, h)
            found = mean + (target - mean) / gate.sigmoid()
            old = torch.cat([old[..., :i], found[..., i : i + 1], old[..., i + 1 :]], -1)
        return old, F.logsigmoid(self._mean_and_gate(old, h)[1]).sum(-1)


class Coupling(nn.Module):
    """The second half of the coordinates is scaled and moved by a network of the first (Dinh et al. 2017, eq. 7 and 8);
    then the order of coordinates is reversed. Both directions are one pass.

    zuko's own transform asks for the places of its mask at each pass, which no CUDA graph can hold.
    """

    def __init__(self, features: int, d: int):
        super().__init__()
        if d < 2:
            raise UserError(f"it moves one half of the latent by the other, and {d} number has no half")
        self.sizes = [d // 2, d - d // 2]
        with torch.device("cpu"):
            self.network = _zuko().nn.MLP(self.sizes[0] + features, 2 * self.sizes[1], HIDDEN, activation=nn.ELU)
        for parameter in self.network[-1].parameters():
            nn.init.zeros_(parameter)  # nothing is moved or scaled at first
        equalize(self.network)

    def _move_and_scale(self, first: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        move, log_scale = self.network(torch.cat([first, h.expand(*first.shape[:-1], -1)], -1)).chunk(2, -1)
        return move, log_scale.tanh() * MOST_SCALING

    def forward(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        first, second = z.split(self.sizes, -1)
        move, log_scale = self._move_and_scale(first, h)
        return torch.cat([first, second * log_scale.exp() + move], -1).flip(-1), log_scale.sum(-1)

    def inverse(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        first, second = z.flip(-1).split(self.sizes, -1)
        move, log_scale = self._move_and_scale(first, h)
        return torch.cat([first, (second - move) * (-log_scale).exp()], -1), log_scale.sum(-1)


class RunTimeScale(nn.Module):
    """A weight as a multiple of a parameter, which is of the order of 1, as in `gan.layers`."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, parameter: Tensor) -> Tensor:
        return parameter * self.scale

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The parameter that makes a weight."""
        return weight / self.scale


def equalize(network: nn.Module) -> None:
    """Let a network's weights be learned at the pace of `gan.layers`: a step of Adam, which is as large for any weight,
    would else change those of a wide layer by a half of themselves, at the rate that suits all others."""
    for layer in list(network.modules()):
        weight = getattr(layer, "weight", None)
        if isinstance(weight, nn.Parameter):
            register_parametrization(layer, "weight", RunTimeScale(1 / math.sqrt(weight.shape[1])))


def _zuko() -> Any:
    try:
        import zuko
    except ImportError as error:
        raise UserError("its networks are zuko's, which is missing: pip install 'zuko>=1.6,<2'") from error
    return zuko


FLOWS: dict[str, Callable[[int, int], nn.Module]] = {  # (features, d) -> a layer
    "planar": Planar,
    "householder": Householder,
    "iaf": InverseAutoregressive,
    "coupling": Coupling,
}
