"""Annealed importance sampling: log p(x) without an approximate posterior (Neal 2001; Wu et al. 2017, section 3)."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from gan.vae.gaussians import normal_log_density
from gan.vae.posteriors import leapfrog

GOAL = 0.65  # share of proposals that Hamiltonian dynamics should have accepted (Neal 2011, section 4.4)
FASTER, SLOWER = 1.02, 0.98
LEAPS = 10
TUNING = 4  # one chain in so many chooses steps
FIRST_STEP = 0.1  # of each image, before it follows the moves


def annealed_log_weights(
    log_likelihood: Callable[[Tensor], Tensor], start: Tensor, steps: int, generator: torch.Generator
) -> Tensor:
    """Log weights [k, N] whose `iwae` is a lower bound on log p(x) on average, tighter with more steps and chains.

    log_likelihood: latents [k, N, d] -> log p(x | z) [k, N]. start: draws of the prior, [k, N, d], one per chain.
    steps: densities p(z) p(x | z)^beta on the way from the prior to the posterior, beta going up as a sigmoid; at each
    one there is a move by Hamiltonian dynamics. Steps of the dynamics are chosen, for each image and density, by other
    chains, a quarter as many, which go the same way first: with steps that follow a chain's own moves its weights would
    not be right on average.
    """
    beta = torch.sigmoid(torch.linspace(-4, 4, steps + 1, dtype=torch.float64))
    beta = (beta - beta[0]) / (beta[-1] - beta[0])
    others = torch.empty_like(start[: max(len(start) // TUNING, 1)]).normal_(generator=generator)
    _, sizes = _anneal(log_likelihood, others, beta.tolist(), generator)
    return _anneal(log_likelihood, start, beta.tolist(), generator, sizes)[0]


def _anneal(
    log_likelihood: Callable[[Tensor], Tensor],
    z: Tensor,
    beta: Sequence[float],
    generator: torch.Generator,
    sizes: Sequence[Tensor] = (),
) -> tuple[Tensor, list[Tensor]]:
    """(log weights of chains that start at z, the steps of their moves). sizes: the steps, in place of those that
    follow the share of accepted moves."""
    size = torch.full_like(z[:1, :, :1], FIRST_STEP)
    used = []
    seen = log_likelihood(z).detach()
    log_weights = (beta[1] - beta[0]) * seen
    for number, (now, after) in enumerate(pairwise(beta[1:])):
        used.append(sizes[number] if sizes else size)
        z, seen, accepted = _move(log_likelihood, z, seen, now, used[-1], generator)
        goal = accepted.to(size).mean(0).view_as(size) > GOAL
        size = size * torch.where(goal, FASTER, SLOWER)
        log_weights = log_weights + (after - now) * seen
    return log_weights, used


def _move(
    log_likelihood: Callable[[Tensor], Tensor],
    z: Tensor,
    seen: Tensor,
    beta: float,
    size: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """One move that keeps p(z) p(x | z)^beta: Hamiltonian dynamics, accepted or not (Neal 2011, section 3).

    seen: log p(x | z). -> (latents, their log p(x | z), which moves were accepted).
    """

    value = seen

    def slope(z: Tensor) -> Tensor:
        nonlocal value  # that of the last z is needed once more
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            likelihood = log_likelihood(z)
            (gradient,) = torch.autograd.grad((normal_log_density(z) + beta * likelihood).sum(), z)
        value = likelihood.detach()
        return gradient

    momentum = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
    energy = normal_log_density(z) + beta * seen + normal_log_density(momentum)
    moved, end = leapfrog(z, momentum, slope, size, LEAPS)
    change = normal_log_density(moved) + beta * value + normal_log_density(end) - energy
    chance = torch.rand(change.shape, generator=generator, dtype=z.dtype, device=z.device).log()
    accepted = chance < change
    return torch.where(accepted.unsqueeze(-1), moved, z), torch.where(accepted, value, seen), accepted
