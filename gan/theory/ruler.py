"""A divergence as a ruler: D_f(P||Q) from two sets of samples, by its variational bound (Nguyen et al. 2010, eq. 8).

A network is fitted to the log density ratio d = log p/q on one part of both sets (by logistic loss: other bounds may
have gradients with heavy tails), its best state is chosen on another, and the bound that it gives on a third, that it
never saw, is reported. Whatever the network, that bound, E_P[f'(e^d)] - E_Q[e^d f'(e^d) - f(e^d)], does not exceed D_f
but by sampling error; how far it stays below depends on the network, so values compare under the same one.

Heavy tails. Between sets that are far apart the second mean rests on samples that hardly ever come: of KL, e^d averages
to 1 under Q, but if one sample of a million brings half of that, ten thousand samples show a mean of 1/2, a bound that
is too high by 1/2, and no spread to warn of it. Two things keep the figures honest.

- d is kept within [-limit, limit], which is only another network: the bound remains one, and each value is bounded. The
  limit, too, is chosen on the second part (`best_limit`).
- error, low and high are those of the held-out values together with one more of each set, the worst that can be within
  the limit: what has not been seen in n samples may still have a share of about 1/n.

A bound can therefore not be far above log n for KL, n the samples of Q held out, however large the divergence is; that
is so for every estimate from samples alone (McAllester & Stratos 2020, "Formal limitations on the measurement of mutual
information"). Pearson's and Neyman's divergences, which grow like e^KL, stop much earlier.
"""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gan.errors import UserError
from gan.methods.divergences import DIVERGENCES, Divergence, Form

FEWEST = 200  # samples in a set
CHECK = 50  # steps between looks at the second part
LOGISTIC = DIVERGENCES["gan"].make().paper  # its output is log u as well, and its gradients have no heavy tails
PATIENCE = 12  # looks without a new best before the fit stops
WIDTH = 64  # of the hidden layers
RARE = 2  # samples at the worst end of a set that do not choose the limit
LIMITS = tuple(step / 2 for step in range(1, 33))  # of |log ratio|; e^16 is more samples than anybody has


@dataclass(frozen=True)
class DivergenceEstimate:
    """What the held-out samples say."""

    bound: float  # E_P[T] - E_Q[f*(T)]: at most D_f, but by sampling error
    low: float  # 95 % bootstrap interval of the bound, with one unseen sample of each set at its worst
    high: float
    error: float  # standard error of the bound, likewise
    limit: float  # the largest |log density ratio| that is believed
    steps: int  # of the fit, up to the state that was chosen
    held_out: int  # samples of the smaller set that the bound is from


class Ratio(nn.Module):
    """Vectors [n, K] or images [n, C, H, W] -> log density ratio [n]; zero before it is trained.

    Vectors: a quadratic form, which is exact between Gaussians, and a network of two hidden layers. Images: three
    strided convolutions before them.
    """

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.body: nn.Module = nn.Identity()
        size = int(np.prod(shape))
        if len(shape) == 3:
            layers: list[nn.Module] = []
            for inputs in (shape[0], 32, 64):
                layers += [nn.Conv2d(inputs, 32 if inputs == shape[0] else 64, 3, 2, 1), nn.LeakyReLU(0.2)]
            self.body = nn.Sequential(*layers, nn.Flatten())
            size = self.body(torch.zeros(1, *shape)).shape[1]
        hidden = [nn.Linear(size, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU()]
        self.network = nn.Sequential(*hidden, nn.Linear(WIDTH, 1))
        self.linear = nn.Linear(size, 1)
        self.factor = nn.Linear(size, min(size, WIDTH), bias=False)
        self.signs = nn.Linear(min(size, WIDTH), 1, bias=False)
        for layer in (self.network[-1], self.linear, self.signs):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return (self.network(x) + self.linear(x) + self.signs(self.factor(x).square())).squeeze(1)


def estimate_divergence(
    divergence: Divergence, p: np.ndarray, q: np.ndarray, seed: int = 0, most_steps: int = 4000, batch: int = 512
) -> DivergenceEstimate:
    """D_f(P||Q) from samples of P [n, ...] and of Q [m, ...]: vectors [K] or images [C, H, W] each.

    Raises UserError for samples of different shape, fewer than 200 of either, or values that are not finite.
    """
    check_samples(p, q)
    form = (divergence.log_ratio or divergence.paper).plain
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = [split(x) for x in standardized(p, q)]
        net = Ratio(tuple(p.shape[1:]))
        ascended = LOGISTIC if divergence.log_ratio else divergence.paper
        steps = fit(net, ascended, parts, most_steps, batch)
    n, m = (len(part[2]) for part in parts)
    limit = best_limit(form, log_ratios(net, parts[0][1]), log_ratios(net, parts[1][1]), n, m)
    t, c = limited_values(form, limit, log_ratios(net, parts[0][2]), log_ratios(net, parts[1][2]))
    rng = np.random.default_rng(seed)
    spread = bootstrap(t.numpy(), rng) - bootstrap(c.numpy(), rng)
    low, high = np.quantile(spread, [0.025, 0.975])
    bound, error = bound_and_error(t, c, n, m)
    return DivergenceEstimate(bound, float(low), float(high), error, limit, steps, min(n, m))


@torch.no_grad()
def log_ratios(net: nn.Module, x: Tensor) -> Tensor:
    """What the network says of samples [n, ...], in pieces that fit memory: float64 [n]."""
    return torch.cat([net(piece) for piece in x.split(4096)]).double()


def limited_values(form: Form, limit: float, p_ratios: Tensor, q_ratios: Tensor) -> tuple[Tensor, Tensor]:
    """(T at samples of P, f*(T) at samples of Q), from log ratios [n] and [m] kept within the limit.

    -> [n + 1] and [m + 1]: the last of each is the worst for the bound that there can be within the limit.
    """
    t = form.value(nn.functional.pad(p_ratios.clamp(-limit, limit), (0, 1), value=-limit))
    c = form.conjugate(nn.functional.pad(q_ratios.clamp(-limit, limit), (0, 1), value=limit))
    return t, c


def bound_and_error(t: Tensor, c: Tensor, n: int, m: int) -> tuple[float, float]:
    """The bound from `limited_values` without the worst, and the standard error with them that n and m samples have."""
    bound = t[:-1].mean() - c[:-1].mean()
    return bound.item(), (t.var() / n + c.var() / m).sqrt().item()


def best_limit(form: Form, p_ratios: Tensor, q_ratios: Tensor, n: int, m: int) -> float:
    """The limit whose bound less half its standard error from n and m samples is largest, by log ratios of P and of Q.

    A lower limit makes the bound smaller, a higher one less certain. Half, because the error counts a worst sample of
    each set that is rarely there: with a whole one the bound stays farther below than its uncertainty calls for.
    The RARE samples of each set that are worst for the bound are left out: whether such samples happen to be in this
    part or not would decide on the limit, and they say next to nothing about the part that the bound is from.
    """
    p_ratios = p_ratios.sort().values[RARE:]
    q_ratios = q_ratios.sort().values[:-RARE]
    scores = []
    for limit in LIMITS:
        bound, error = bound_and_error(*limited_values(form, limit, p_ratios, q_ratios), n, m)
        scores.append((bound - error / 2, limit))
    return max(scores)[1]


def between_gaussians(
    divergence: Divergence,
    p: tuple[np.ndarray, np.ndarray],
    q: tuple[np.ndarray, np.ndarray],
    draws: int = 4_000_000,
    seed: int = 0,
) -> float:
    """D_f between Gaussians with independent coordinates, (means [K], deviations [K]) each, by importance sampling.

    Half of the draws are P's and half Q's. The relative error is about draws^-1/2 where f(u) / (1 + u) is bounded, as
    for Jensen-Shannon and Hellinger, and larger for the others the farther apart the two are.
    """
    rng = np.random.default_rng(seed)
    total = 0.0
    block = 100_000
    blocks = 2 * max(round(draws / block / 2), 1)
    for i in range(blocks):
        mean, deviation = (p, q)[i % 2]
        x = mean + deviation * rng.standard_normal((block, len(mean)))
        log_p, log_q = (-(((x - m) / s) ** 2).sum(1) / 2 - np.log(s).sum() for m, s in (p, q))
        u = torch.from_numpy(np.exp(log_p - log_q))
        total += (2 * divergence.generator(u) / (1 + u)).sum().item()  # q f(u) / ((p + q) / 2)
    return total / (blocks * block)


def check_samples(p: np.ndarray, q: np.ndarray) -> None:
    """Raises UserError where the sets cannot be compared."""
    if p.shape[1:] != q.shape[1:]:
        raise UserError(f"samples differ in shape: {list(p.shape[1:])} against {list(q.shape[1:])}")
    if p.ndim not in (2, 4):
        raise UserError(f"samples must be vectors [n, K] or images [n, C, H, W], got {list(p.shape)}")
    if min(len(p), len(q)) < FEWEST:
        raise UserError(f"{len(p)} and {len(q)} samples are too few to hold any out; give at least {FEWEST} of each")
    if not (np.isfinite(p).all() and np.isfinite(q).all()):
        raise UserError("samples hold values that are not finite")


def standardized(p: np.ndarray, q: np.ndarray) -> tuple[Tensor, Tensor]:
    """Both sets as float32 with mean 0 and deviation 1 over their union, per coordinate or per channel."""
    x, y = torch.from_numpy(np.asarray(p, np.float32)), torch.from_numpy(np.asarray(q, np.float32))
    over = (0, *range(2, x.ndim))
    both = torch.cat([x, y])
    mean, deviation = both.mean(over, keepdim=True), both.std(over, keepdim=True).clamp(min=1e-6)
    return (x - mean) / deviation, (y - mean) / deviation


def split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """At random: 45 % to fit, 15 % to choose by, 40 % held out."""
    order = torch.randperm(len(x))
    fitted, chosen = int(0.45 * len(x)), int(0.6 * len(x))
    return x[order[:fitted]], x[order[fitted:chosen]], x[order[chosen:]]


def fit(net: Ratio, form: Form, parts: list[tuple[Tensor, Tensor, Tensor]], most_steps: int, batch: int) -> int:
    """Ascend the form's bound on the first parts; leaves `net` at the average of weights that is best on the second.

    -> steps up to that state; 0 if nothing was better than knowing nothing.
    """
    average = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    best = -math.inf
    best_state = copy.deepcopy(average.state_dict())
    best_step = 0
    for step in range(most_steps + 1):
        if step % CHECK == 0:
            real, fake = (log_ratios(average, part[1]) for part in parts)
            value = (form.value(real).mean() - form.conjugate(fake).mean()).item()
            if value > best:
                best = value
                best_state = copy.deepcopy(average.state_dict())
                best_step = step
            elif step - best_step > PATIENCE * CHECK:
                break
        x, y = (part[0][torch.randint(len(part[0]), (batch,))] for part in parts)
        loss = form.conjugate(net(y)).mean() - form.value(net(x)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for a, b in zip(average.parameters(), net.parameters(), strict=True):
                a.lerp_(b, 0.02)
    net.load_state_dict(best_state)
    return best_step


def bootstrap(values: np.ndarray, rng: np.random.Generator, count: int = 1000) -> np.ndarray:
    """Means of `count` resamplings of values [n]."""
    return np.array([values[rng.integers(0, len(values), len(values))].mean() for _ in range(count)])
