"""The Dirac-GAN (Mescheder et al. 2018, section 2): the smallest GAN, run through the very rows that images train by.

Data is a point at 0, the generator a point at theta, the critic D(x) = -psi x: the sign makes (theta, psi) those of the
paper, where D is high on fakes. Every quantity is float64. A state is a pair (theta, psi).
"""

import cmath
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gan.draws import Draws
from gan.errors import UserError
from gan.methods.critic import Critic
from gan.methods.pairs import critic_loss, find_pair

DRAWS = Draws(0, range(1), 1)


@dataclass(frozen=True)
class Game:
    """An objective, a regularizer with its weight, and two ways to calm a game that are no rows.

    noise: instance noise of this standard deviation on both points, integrated by 81 Gauss-Hermite nodes.
    consensus: both players also descend consensus / 2 * |v|^2, v the field without it (Mescheder et al. 2017).
    """

    objective: str = "f:gan:saturating=1"
    regularizer: str = "none"
    gamma: float = 0.0
    noise: float = 0.0
    consensus: float = 0.0


def losses(game: Game, theta: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    """(G's, D's) loss with the penalty, 0-dim, differentiable in theta and psi.

    Raises UserError for objectives that compare sets of samples: there is one.
    """
    objective, regularizer = find_pair(game.objective, game.regularizer)
    if objective.group > 1:
        raise UserError(f"objective.name={game.objective} couples samples, and the Dirac-GAN has one of each")
    nodes, weights = np.polynomial.hermite_e.hermegauss(81) if game.noise else (np.zeros(1), np.ones(1))
    spread = torch.from_numpy(game.noise * nodes).unsqueeze(1)
    weight = torch.from_numpy(weights / weights.sum())

    critic = Critic(lambda images: (-psi * images).squeeze(1), DRAWS)
    d = critic_loss(objective, regularizer, critic, spread, theta + spread)
    d_loss = (weight * (d.loss + sum(game.gamma / 2 * penalty for penalty in d.penalties))).sum()
    g_loss = (weight * objective.generator(d.real_outputs, critic(theta + spread, "fakes of the G step"))).sum()
    return g_loss, d_loss


def field(game: Game, state: Tensor) -> Tensor:
    """v(theta, psi): minus the gradients that the players descend. [2] -> [2], differentiable."""
    with torch.enable_grad():
        theta, psi = (x.clone() for x in (state if state.requires_grad else state.detach().requires_grad_()))
        g_loss, d_loss = losses(game, theta, psi)
        v = -torch.stack(
            [torch.autograd.grad(loss, x, create_graph=True)[0] for loss, x in ((g_loss, theta), (d_loss, psi))]
        )
        if game.consensus:
            half = game.consensus / 2 * v.square().sum()
            v = v - torch.stack(torch.autograd.grad(half, (theta, psi), create_graph=True))
    return v


def jacobian(game: Game, state: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """dv / d(theta, psi) at a state, by autograd: float64 [2, 2]."""
    at = torch.tensor(state, dtype=torch.float64)
    return torch.autograd.functional.jacobian(lambda s: field(game, s), at).detach().numpy()


def eigenvalues(matrix: np.ndarray) -> tuple[complex, complex]:
    """Of a real 2x2 matrix, by trace and determinant: exact where they meet, which iterations are not."""
    half = (matrix[0, 0] + matrix[1, 1]) / 2
    root = cmath.sqrt(half * half - (matrix[0, 0] * matrix[1, 1] - matrix[0, 1] * matrix[1, 0]))
    return half + root, half - root


def trajectory(
    game: Game,
    step: float = 0.1,
    count: int = 500,
    alternating: bool = True,
    start: tuple[float, float] = (1.0, 1.0),
    n_critic: int = 1,
) -> Iterator[tuple[float, float]]:
    """`count` states after `start`, of gradient descent by both players with the same step size.

    alternating: theta moves first, then psi n_critic times with the new theta; otherwise both at once.
    """
    state = torch.tensor(start, dtype=torch.float64)
    for _ in range(count):
        move = field(game, state).detach()
        if alternating:
            state = state + step * move * torch.tensor([1.0, 0.0])
            for _ in range(n_critic):
                state = state + step * field(game, state).detach() * torch.tensor([0.0, 1.0])
        else:
            state = state + step * move
        yield state[0].item(), state[1].item()


def step_matrix(matrix: np.ndarray, step: float, alternating: bool, n_critic: int = 1) -> np.ndarray:
    """The linear map of one update near an equilibrium with this Jacobian."""
    if not alternating:
        return np.eye(2) + step * matrix
    first, second = np.eye(2), np.eye(2)
    first[0] += step * matrix[0]
    second[1] += step * matrix[1]
    return np.linalg.matrix_power(second, n_critic) @ first


def step_bound(game: Game, alternating: bool, n_critic: int = 1, largest: float = 64.0) -> float:
    """The step size below which updates contract to the equilibrium (0, 0), by bisection of the spectral radius.

    0 where none does, which is how a game without damping comes out.
    """
    matrix = jacobian(game)

    def contracts(step: float) -> bool:
        return max(map(abs, eigenvalues(step_matrix(matrix, step, alternating, n_critic)))) < 1 - 1e-14

    steps = np.geomspace(1e-3, largest, 2000)
    good = [contracts(step) for step in steps]
    if not good[0]:
        return 0.0
    if all(good):
        return math.inf
    low, high = steps[good.index(False) - 1], steps[good.index(False)]
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if contracts(middle) else (low, middle)
    return float(low)
