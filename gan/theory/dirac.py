"""The Dirac-GAN (Mescheder et al. 2018, section 2): the smallest GAN, run through the very rows that images train by.

Data is a point at 0, the generator a point at theta, the critic D(x) = -psi x: the sign makes (theta, psi) those of the
paper, where D is high on fakes. Every quantity is float64. A state is a pair (theta, psi). Nothing is random here: the
expectation over noise that training draws is taken by Gauss-Hermite quadrature.
"""

import cmath
import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import cache
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from gan.draws import Draws
from gan.errors import UserError
from gan.methods.critic import Critic
from gan.methods.objectives import Objective
from gan.methods.pairs import critic_loss, find_pair
from gan.methods.regularizers import Regularizer

NODES = 81  # of the quadrature


@dataclass(frozen=True)
class Game:
    """An objective, a regularizer with its weight, and a way to calm a game that is no row.

    consensus: both players also descend consensus / 2 * |v|^2, v the field without it (Mescheder et al. 2017).
    """

    objective: str = "f:gan:saturating=1"
    regularizer: str = "none"
    gamma: float = 0.0
    consensus: float = 0.0


def find_rows(game: Game) -> tuple[Objective, Regularizer]:
    """The rows of a game's two names. Raises UserError for what the Dirac-GAN cannot show."""
    objective, regularizer = find_pair(game.objective, game.regularizer)
    name = f"regularizer.name={game.regularizer}"
    if objective.group > 1:
        raise UserError(f"objective.name={game.objective} couples samples, and the Dirac-GAN has one of each")
    if regularizer.pictures:
        raise UserError(f"{name} changes pictures, and the Dirac-GAN has points; try another")
    if regularizer.prepare:
        raise UserError(f"{name} changes D's layers, and the Dirac-GAN's D is a single number; try another")
    if regularizer.constrain and not game.gamma > 0:
        raise UserError(f"{name} at regularizer.gamma={game.gamma:g} leaves no D; give a positive gamma")
    return objective, regularizer


@dataclass(frozen=True)
class Nodes(Draws):
    """Stands in for random draws: sample i gets the i-th node of a quadrature, whose weights are `weights`."""

    _: KW_ONLY
    reals: Tensor  # [N, 1], the standard normal noise on reals, and on anything that is not a fake
    fakes: Tensor  # [N, 1]
    weights: Tensor  # [N], of sum 1: a mean by them is an expectation over the noise

    def noise(self, purpose: str, like: Tensor) -> Tensor:
        """[N, 1]."""
        return self.fakes if "fakes" in purpose else self.reals

    def uniform(self, purpose: str, count: int) -> Tensor:
        """[N, count] of 1/2: rows ask for a point between real and fake, and D's slope is the same at all of them."""
        return torch.full((len(self.weights), count), 0.5)


@cache
def quadrature(independent: bool) -> Nodes:
    """Gauss-Hermite nodes. `independent`: every pair of one for the real and one for the fake, for losses that are no
    sum of a function of each."""
    points, weights = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(NODES))
    weights = weights / weights.sum()
    if not independent:
        column = points.unsqueeze(1)
        return Nodes(0, range(NODES), 1, reals=column, fakes=column, weights=weights)
    pairs = torch.cartesian_prod(points, points)
    both = weights.outer(weights).flatten()
    return Nodes(0, range(NODES**2), 1, reals=pairs[:, :1], fakes=pairs[:, 1:], weights=both)


def losses(game: Game, theta: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    """(G's, D's) loss with the penalty, 0-dim, differentiable in theta and psi. Raises UserError as `find_rows`."""
    objective, regularizer = find_rows(game)
    nodes = quadrature(independent=regularizer.noise and objective.paired)
    real = torch.zeros_like(nodes.reals)
    fake = theta + torch.zeros_like(nodes.fakes)

    noise = math.sqrt(game.gamma) if regularizer.noise else None
    critic = Critic(lambda images: (-psi * images).squeeze(1), nodes, noise=noise)
    d = critic_loss(objective, regularizer, critic, real, fake)
    d_loss = d.loss + sum(game.gamma / 2 * penalty for penalty in d.penalties)
    g_loss = objective.generator(d.real_outputs, critic(fake, "fakes of the G step"))
    return nodes.weights @ g_loss, nodes.weights @ d_loss


def constrained(game: Game, state: Tensor) -> Tensor:
    """(theta, psi) after what the regularizer does to D at the end of an update, as clipping: [2] -> [2]."""
    _, regularizer = find_rows(game)
    if regularizer.constrain is None:
        return state
    D = nn.Module()
    D.psi = nn.Parameter(state[1].clone())
    regularizer.constrain(D, game.gamma)
    return torch.stack([state[0], D.psi.detach()])


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


def arrows(game: Game, reach: float, half: int, length: float) -> list[tuple[float, float, float, float]]:
    """A phase portrait of the field: (theta, psi, the arrow's extent in each), all of one length.

    half: rows, and columns, of arrows on either side of 0; they fill |theta| and |psi| up to `reach`.
    """
    places = [reach * (i + 0.5) / half for i in range(-half, half)]
    found = []
    for theta, psi in product(places, places):
        u, v = field(game, torch.tensor([theta, psi], dtype=torch.float64)).tolist()
        size = max(math.hypot(u, v), 1e-9)
        found.append((theta, psi, length * u / size, length * v / size))
    return found


def jacobian(game: Game, state: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """dv / d(theta, psi) at a state, by autograd: float64 [2, 2]. Clipping does nothing near (0, 0), nor here."""
    at = torch.tensor(state, dtype=torch.float64)
    return torch.autograd.functional.jacobian(lambda s: field(game, s), at).detach().numpy()


def eigenvalues(matrix: np.ndarray) -> tuple[complex, complex]:
    """Of a real 2x2 matrix, by trace and determinant: exact where they meet, which iterations are not."""
    half = (matrix[0, 0] + matrix[1, 1]) / 2
    root = cmath.sqrt(half * half - (matrix[0, 0] * matrix[1, 1] - matrix[0, 1] * matrix[1, 0]))
    return half + root, half - root


def trajectory(
    game: Game, step: float = 0.1, count: int = 500, alternating: bool = True
) -> Iterator[tuple[float, float]]:
    """`count` states after (1, 1), of gradient descent by both players with the same step size.

    alternating: theta moves first, then psi with the new theta; otherwise both at once.
    """
    state = torch.ones(2, dtype=torch.float64)
    for _ in range(count):
        move = field(game, state).detach()
        if alternating:
            state = state + step * move * torch.tensor([1.0, 0.0])
            state = constrained(game, state + step * field(game, state).detach() * torch.tensor([0.0, 1.0]))
        else:
            state = constrained(game, state + step * move)
        yield state[0].item(), state[1].item()


def step_matrix(matrix: np.ndarray, step: float, alternating: bool, n_critic: int = 1) -> np.ndarray:
    """The linear map of one update near an equilibrium with this Jacobian."""
    if not alternating:
        return np.eye(2) + step * matrix
    first, second = np.eye(2), np.eye(2)
    first[0] += step * matrix[0]
    second[1] += step * matrix[1]
    return np.linalg.matrix_power(second, n_critic) @ first


def step_bound(game: Game, alternating: bool, n_critic: int = 1) -> float:
    """The step size below which updates contract to the equilibrium (0, 0), by bisection of the spectral radius.

    0 where not even 1e-6 does, which is how a game without damping comes out.
    """
    matrix = jacobian(game)

    def contracts(step: float) -> bool:
        return max(map(abs, eigenvalues(step_matrix(matrix, step, alternating, n_critic)))) < 1 - 1e-14

    steps = np.geomspace(1e-6, 64, 4000)
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
