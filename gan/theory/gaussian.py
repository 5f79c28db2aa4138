"""The first experiment of the f-GAN paper: fit a Gaussian Q to a mixture P by each divergence (Nowozin et al. 2016,
section 4.1).

Exact parameters come from quadrature and a search over mean and deviation, in float64; learned ones from training with
the objectives that images are trained with. Everything is one-dimensional.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gan.draws import Draws
from gan.errors import UserError
from gan.methods.critic import Critic
from gan.methods.divergences import Divergence
from gan.methods.pairs import critic_loss, find_pair, generator_loss
from gan.ranks.gradients import GradientSum

WIDE = 14.0  # integrals extend over this many standard deviations to either side
MOST = 300.0  # of the logarithm of p / q, as some generators square what it is of
LESS = 250.0  # what does not depend on the one above comes out alike with this one
FINENESS = 24  # means, and deviations, of the grid on which minima are looked for


@dataclass(frozen=True)
class Mixture:
    """The mixture P of Gaussians. Raises UserError if it has no components, a weight or variance is not positive, or a
    number is not finite."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    variances: tuple[float, ...]

    def __post_init__(self) -> None:
        numbers = (*self.weights, *self.means, *self.variances)
        if not self.weights or not all(map(math.isfinite, numbers)) or min(*self.weights, *self.variances) <= 0:
            raise UserError("a mixture needs components of positive weight and positive variance")

    @property
    def shares(self) -> np.ndarray:
        """The weights, normalized to sum to one: [components]."""
        return np.array(self.weights) / sum(self.weights)

    @property
    def moments(self) -> tuple[float, float]:
        """(mean, standard deviation)."""
        mean = float(self.shares @ self.means)
        second = self.shares @ (np.array(self.variances) + np.array(self.means) ** 2)
        return mean, math.sqrt(second - mean**2)

    def log_density(self, x: Tensor) -> Tensor:
        """log p(x): [n] -> [n]."""
        m, v = (torch.tensor(t, dtype=x.dtype) for t in (self.means, self.variances))
        each = torch.from_numpy(self.shares).log().to(x) - (x.unsqueeze(1) - m).square() / (2 * v)
        return (each - (2 * math.pi * v).log() / 2).logsumexp(1)

    def sample(self, draws: Draws, purpose: str) -> Tensor:
        """Draw samples, float32 [n, 1]."""
        u = draws.uniform(f"component: {purpose}", 1).numpy()
        pick = torch.from_numpy(np.searchsorted(self.shares.cumsum()[:-1], u))
        m, s = (torch.tensor(t)[pick] for t in (self.means, [math.sqrt(v) for v in self.variances]))
        return m + s * draws.latents(purpose, 1)


def log_normal(x: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """log density of N(mean, exp(log_deviation)^2) at x: [n]."""
    return -((x - mean) * (-log_deviation).exp()).square() / 2 - log_deviation - math.log(2 * math.pi) / 2


def nodes(mixture: Mixture, mean: float, deviation: float, coarse: bool = False) -> tuple[Tensor, Tensor]:
    """Points and weights, float64 [n], for integrals of functions of the densities of P and Q = N(mean, deviation^2).

    Gauss-Legendre quadrature on panels that follow every component's width. Panels also end where p = q, as total
    variation has kinks there. With `coarse`, integrals have about four correct digits.
    """
    parts = [(mean, deviation), *zip(mixture.means, map(math.sqrt, mixture.variances), strict=True)]
    edges = np.unique(np.concatenate([np.linspace(m - WIDE * s, m + WIDE * s, 57) for m, s in parts]))
    if not coarse:
        edges = np.unique(np.concatenate([edges, _crossings(mixture, mean, deviation, edges)]))
    points, weights = np.polynomial.legendre.leggauss(3 if coarse else 12)
    half = np.diff(edges)[:, None] / 2
    middle = (edges[1:] + edges[:-1])[:, None] / 2
    return torch.from_numpy((middle + half * points).ravel()), torch.from_numpy((half * weights).ravel())


def _crossings(mixture: Mixture, mean: float, deviation: float, edges: np.ndarray) -> np.ndarray:
    """The points where p = q, exact up to rounding, by bisection between neighbors of a fine grid."""
    grid = torch.from_numpy(np.interp(np.arange(0, len(edges) - 1, 0.125), np.arange(len(edges)), edges))
    location = torch.tensor(mean)
    log_deviation = torch.tensor(math.log(deviation))

    def above(x: Tensor) -> Tensor:
        return mixture.log_density(x) > log_normal(x, location, log_deviation)

    sign = above(grid)
    flips = (sign[1:] != sign[:-1]).nonzero().squeeze(1)
    low = grid[flips]
    high = grid[flips + 1]
    left = sign[flips]
    for _ in range(50):
        middle = (low + high) / 2
        same = above(middle) == left
        low = torch.where(same, middle, low)
        high = torch.where(same, high, middle)
    return low.numpy()


def exact_divergence(
    divergence: Divergence,
    mixture: Mixture,
    mean: Tensor,
    log_deviation: Tensor,
    coarse: bool = False,
    most: float = MOST,
) -> Tensor:
    """D_f(P || N(mean, deviation^2)) by quadrature, 0-dim and differentiable; inf if the value is not finite.

    Where the densities differ by more than a factor of e^most, they count as differing by that.
    """
    x, weight = nodes(mixture, mean.item(), log_deviation.exp().item(), coarse)
    log_p = mixture.log_density(x)
    log_q = log_normal(x, mean, log_deviation)
    ratio = (log_p - log_q).clamp(-most, most)
    # q f(u) if u < 1, else p f(u) / u, which is the same: the smaller of both densities may underflow to 0.
    u = ratio.exp()
    f = divergence.generator(u)
    value = (weight * torch.where(ratio < 0, log_q.exp() * f, log_p.exp() * f / u)).sum()
    return torch.where(value.isfinite(), value, math.inf)


@dataclass(frozen=True)
class Optimum:
    """A local minimum of D_f(P || N(mean, deviation^2))."""

    divergence: float
    mean: float
    deviation: float


def optima(divergence: Divergence, mixture: Mixture) -> list[Optimum]:
    """The local minima over mean and deviation, found from those of a grid; the global one comes first.

    Raises UserError if the divergence of no Gaussian is finite."""
    center, spread = mixture.moments
    low = min(m - 0.5 * math.sqrt(v) for m, v in zip(mixture.means, mixture.variances, strict=True))
    high = max(m + 0.5 * math.sqrt(v) for m, v in zip(mixture.means, mixture.variances, strict=True))
    means = np.append(np.linspace(low, high, FINENESS), center)
    means.sort()
    deviations = np.geomspace(min(map(math.sqrt, mixture.variances)) / 1.6, 1.8 * spread, FINENESS)
    with torch.no_grad():
        pairs = [torch.tensor([m, math.log(s)], dtype=torch.float64) for m in means for s in deviations]
        values = [exact_divergence(divergence, mixture, pair[0], pair[1], coarse=True).item() for pair in pairs]
    table = np.array(values).reshape(len(means), FINENESS)
    padded = np.pad(table, 1, constant_values=math.inf)
    around = [padded[1 + i : 1 + i + len(means), 1 + j : 1 + j + FINENESS] for i in (-1, 0, 1) for j in (-1, 0, 1)]
    # Where the divergence is very large, so are the errors of its quadrature: no minimum is looked for there.
    starts = np.argwhere((table <= np.min(around, axis=0)) & (table < 1e4 * (1 + abs(table.min()))))
    found: list[Optimum] = []
    for optimum in sorted((_polish(divergence, mixture, means[i], deviations[j]) for i, j in starts), key=_value):
        if math.isfinite(optimum.divergence) and all(
            math.dist((o.mean, o.deviation), (optimum.mean, optimum.deviation)) > 1e-3 for o in found
        ):
            found.append(optimum)
    if not found:
        raise UserError("no Gaussian has a finite divergence from this mixture: its components are too far apart")
    return found


def _value(optimum: Optimum) -> float:
    return optimum.divergence


def _polish(divergence: Divergence, mixture: Mixture, mean: float, deviation: float) -> Optimum:
    at = torch.tensor([mean, math.log(deviation)], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [at], max_iter=100, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = exact_divergence(divergence, mixture, at[0], at[1])
        value.backward()
        return value

    optimizer.step(closure)
    with torch.no_grad():
        value, other = (exact_divergence(divergence, mixture, at[0], at[1], most=most).item() for most in (MOST, LESS))
    if not math.isclose(value, other, rel_tol=1e-6, abs_tol=1e-9):
        value = math.inf  # it is made by that limit
    return Optimum(value, at[0].item(), at[1].exp().item())


def fit(
    objective_name: str,
    mixture: Mixture,
    steps: int = 6000,
    batch: int = 1024,
    lr: float = 2e-3,
    seed: int = 0,
    regularizer_name: str = "r1_r2",
    gamma: float = 2e-3,
) -> Iterator[Optimum]:
    """Train mean and deviation against a critic with two hidden layers of 64 units. Yields an Optimum after every step,
    whose `divergence` is the bound F on that step's batch.

    Both players step simultaneously, by Adam: the critic with learning rate `lr`, the Gaussian with a quarter of it.
    Over the second half of the run both rates fall to a tenth, along half a cosine wave. gamma falls to a hundredth
    over the run (Roth et al. 2017): without a penalty, total variation's critic saturates before it has found the four
    points where p = q; with a constant gamma, the minimum is elsewhere. Training starts at the mixture's own mean and
    deviation: if a divergence has several minima, the one in whose basin this start lies is found.
    """
    objective, regularizer = find_pair(objective_name, regularizer_name)
    center, spread = mixture.moments
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    at = torch.tensor([center, math.log(spread)], requires_grad=True)

    def D(x: Tensor) -> Tensor:
        return net((x - center) / spread).squeeze(1)

    players: list[dict[str, Any]] = [{"params": [at]}, {"params": list(net.parameters())}]
    optimizer = torch.optim.Adam(players)
    rates = (lr / 4, lr)
    for step in range(steps):
        draws = Draws(seed, range(step, step + 1), batch)
        critic = Critic(D, draws)
        real = mixture.sample(draws, "reals")
        fake = at[0] + at[1].exp() * draws.latents("latents", 1)
        d_loss = critic_loss(objective, regularizer, critic, real, fake)
        g_loss = generator_loss(objective, critic, real, fake)
        weight = gamma / 2 * 0.01 ** (step / steps)
        _set_gradient([at], g_loss.total(), batch)
        _set_gradient(net.parameters(), d_loss.total(weight), batch)
        progress = max(2 * step / steps - 1, 0.0)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)
        optimizer.step()
        yield Optimum(-d_loss.loss.mean().item(), at[0].item(), at[1].exp().item())


def _set_gradient(parameters: Iterable[Tensor], loss: Tensor, batch: int) -> None:
    gradients = GradientSum(parameters, batch)
    gradients.add(loss)
    gradients.finish()


def learned(objective_name: str, mixture: Mixture, steps: int = 6000, seed: int = 0, **options: Any) -> Optimum:
    """The average of `fit` over the last quarter of its steps."""
    states = list(fit(objective_name, mixture, steps, seed=seed, **options))[steps * 3 // 4 :]
    return Optimum(
        *(float(np.mean([getattr(s, name) for s in states])) for name in ("divergence", "mean", "deviation"))
    )
