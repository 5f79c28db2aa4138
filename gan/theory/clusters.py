"""GANs small enough to train many of them: the data are clusters in the plane, the networks have two hidden layers.

Those of several seeds are trained at once, by products of stacks of matrices: three take little longer than one.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from gan.config import RegularizerConfig
from gan.draws import Draws
from gan.methods.critic import Critic, no_critic
from gan.methods.objectives import Objective
from gan.methods.pairs import critic_loss, find_pair, generator_loss
from gan.methods.regularizers import Regularizer
from gan.metrics.modes import mode_kl
from gan.parts import Part, split_by_turn
from gan.schedules import PenaltyTurns, penalty_turns

SPREAD = 0.1  # standard deviation of a cluster
LATENT = 4
WIDTH = 64
BATCH = 256
GROUP = 16
SAMPLES = 2500
LANES = 16  # numbers that a processor works on at once, at most
POINTS: dict[str, np.ndarray] = {
    "ring": 2 * np.stack([(math.cos(t), math.sin(t)) for t in 2 * math.pi * np.arange(8) / 8]),
    "grid": np.stack([(x, y) for x in range(-4, 5, 2) for y in range(-4, 5, 2)]).astype(float),
}


@dataclass(frozen=True)
class Recipe:
    """How the small GANs are trained: all that is not the method."""

    steps: int = 3000  # of G
    g_lr: float = 3e-3
    d_lr: float = 3e-3
    betas: tuple[float, float] = (0.0, 0.99)  # of Adam
    n_critic: int = 1  # updates of D per update of G
    decay: float = 0.01  # share of itself that the averaged generator forgets in a step of G
    every: int = 1  # this and `share` as in gan.config.RegularizerConfig
    share: float = 1.0
    group: int = GROUP  # samples in a coupling group


@dataclass
class Trained:
    """What became of one seed."""

    points: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))  # [SAMPLES, 2] of the averaged generator
    largest: float = 0.0  # D's largest |score| of a fake in the last step
    looks: list[tuple[int, dict[str, float | int]]] = field(default_factory=list)  # (steps of G, `describe`), in turn


def train_points(
    objective_name: str,
    regularizer_name: str,
    gamma: float,
    centers: np.ndarray,
    seed: int,
    steps: int,
    every: int = 1,
    share: float = 1.0,
) -> dict[str, float | int]:
    """Train a GAN on Gaussian clusters of deviation SPREAD about `centers` [modes, 2]. -> figures of 2500 samples of
    its averaged generator.

    They are those of `describe`, and largest: D's largest |score| of a fake in the last step, NaN if the samples are
    not finite. every, share: as in gan.config.RegularizerConfig.
    """
    recipe = Recipe(steps=steps, every=every, share=share)
    (trained,) = train_seeds(objective_name, regularizer_name, gamma, centers, [seed], recipe, [steps])
    finite = np.isfinite(trained.points).all()
    return {**describe(trained.points, centers), "largest": trained.largest if finite else math.nan}


def train_seeds(
    objective_name: str,
    regularizer_name: str,
    gamma: float,
    centers: np.ndarray,
    seeds: Sequence[int],
    recipe: Recipe,
    look_at: Sequence[int],
) -> list[Trained]:
    """Train a GAN for each seed, on clusters as `train_points` does. What becomes of a seed does not depend on the
    others, to the last bit; one whose numbers overflow does not disturb them. A share of less than 1 takes one seed.

    look_at: the steps of G after which samples are described.
    """
    assert recipe.share == 1 or len(seeds) == 1
    # One matrix alone is multiplied by other code than a stack of them, which rounds in another way.
    trained_with = seeds if len(seeds) > 1 or recipe.share < 1 else [*seeds, *seeds]
    objective, regularizer = find_pair(objective_name, regularizer_name)
    players = _Players.new(objective, regularizer, float(np.abs(centers).max()), trained_with, recipe)
    trained = [Trained() for _ in trained_with]
    for step in range(recipe.steps):
        for turn in range(step * recipe.n_critic, (step + 1) * recipe.n_critic):
            draws = players.draws(turn)
            critic = players.critic(draws, gamma)
            real = clusters(centers, draws)
            scores = _d_step(players, critic, real, turn, gamma)
        _g_step(players, critic, real)
        if step + 1 in look_at:
            for one, points, largest in zip(trained, players.samples(), scores.abs().amax(1), strict=True):
                one.points = points
                one.largest = largest.item()
                one.looks.append((step + 1, describe(points, centers)))
    return trained[: len(seeds)]


@dataclass
class _Players:
    """The networks of all seeds with their optimizers."""

    objective: Objective
    regularizer: Regularizer
    seeds: tuple[int, ...]
    recipe: Recipe
    turns: PenaltyTurns
    G: "Crowd"
    D: "Crowd"
    average: "Crowd"
    parameters: dict[str, list[Tensor]]
    g_optimizer: torch.optim.Optimizer
    d_optimizer: torch.optim.Optimizer

    @classmethod
    def new(
        cls, objective: Objective, regularizer: Regularizer, scale: float, seeds: Sequence[int], recipe: Recipe
    ) -> "_Players":
        pairs = [_networks(seed, objective.outputs, regularizer.prepare) for seed in seeds]
        G = Crowd([G for G, _ in pairs], after=scale)
        D = Crowd([D for _, D in pairs], before=1 / scale)
        average = copy.deepcopy(G).requires_grad_(False)
        adam = partial(torch.optim.Adam, betas=recipe.betas, fused=True)
        penalty = RegularizerConfig(every=recipe.every, share=recipe.share)
        return cls(
            objective=objective,
            regularizer=regularizer,
            seeds=tuple(seeds),
            recipe=recipe,
            turns=penalty_turns(penalty, BATCH, math.lcm(recipe.group, objective.group)),
            G=G,
            D=D,
            average=average,
            parameters={"G": list(G.parameters()), "D": list(D.parameters()), "average": list(average.parameters())},
            g_optimizer=adam(G.parameters(), lr=recipe.g_lr),
            d_optimizer=adam(D.parameters(), lr=recipe.d_lr),
        )

    def draws(self, turn: int) -> "SeedDraws":
        """The random numbers of a batch, of every seed."""
        groups = BATCH // self.recipe.group
        return SeedDraws(0, range(turn * groups, (turn + 1) * groups), self.recipe.group, seeds=self.seeds)

    def critic(self, draws: Draws, gamma: float) -> Critic:
        D = self.D if self.objective.discriminator else no_critic
        return Critic(D, draws, noise=math.sqrt(gamma) if self.regularizer.noise else None)

    @torch.no_grad()
    def samples(self) -> np.ndarray:
        """Of the averaged generators: [seeds, SAMPLES, 2]."""
        groups = range(-(-SAMPLES // GROUP))
        latents = SeedDraws(0, groups, GROUP, seeds=self.seeds).latents("samples", LATENT)
        return self.average.each(latents.unflatten(0, (len(self.seeds), -1))[:, :SAMPLES]).numpy()


def _d_step(players: _Players, critic: Critic, real: Tensor, turn: int, gamma: float) -> Tensor:
    """One update of D. -> the scores of the fakes, [seeds, n]; of no numbers where there is no D."""
    if not players.objective.discriminator:
        return torch.zeros(len(players.seeds), 1)
    losses = []
    for part in split_by_turn([Part(real, None, critic.draws)], players.turns, turn, turn * BATCH):
        fake = players.G(part.latents("latents", LATENT)).detach()
        part_critic = replace(critic, draws=part.draws)
        losses.append(critic_loss(players.objective, players.regularizer, part_critic, part.real, fake, part.due))
    weight = gamma / 2 * players.turns.weight
    _descend(torch.stack([loss.total(weight) for loss in losses]).sum(), players.parameters["D"], players.d_optimizer)
    if players.regularizer.constrain:
        players.regularizer.constrain(players.D, gamma)
    return torch.cat([loss.fake_scores.detach().view(len(players.seeds), -1) for loss in losses], 1)


def _g_step(players: _Players, critic: Critic, real: Tensor) -> None:
    """One update of G and of its average."""
    fake = players.G(critic.draws.latents("latents of the G step", LATENT))
    loss = generator_loss(players.objective, critic, real, fake).total()
    _descend(loss, players.parameters["G"], players.g_optimizer)
    with torch.no_grad():
        torch._foreach_lerp_(players.parameters["average"], players.parameters["G"], players.recipe.decay)


def describe(points: np.ndarray, centers: np.ndarray) -> dict[str, float | int]:
    """Figures of points [n, 2] that are to be clusters about `centers` [modes, 2].

    modes: the number of clusters with at least 5 samples within three deviations; near: the share of samples within
    three deviations of a cluster; mode_kl: KL(histogram of nearest clusters || uniform).
    """
    if not np.isfinite(points).all():
        return {"modes": 0, "near": math.nan, "mode_kl": math.nan}
    distance = np.linalg.norm(points[:, None] - centers[None], axis=2)
    nearest = distance.argmin(1)
    near = distance.min(1) < 3 * SPREAD
    good = np.bincount(nearest[near], minlength=len(centers))
    return {
        "modes": int((good >= 5).sum()),
        "near": float(near.mean()),
        "mode_kl": mode_kl(np.bincount(nearest, minlength=len(centers))),
    }


def clusters(centers: np.ndarray, draws: Draws) -> Tensor:
    """Draw real points, float32 [n, 2]."""
    pick = (draws.uniform("cluster", 1).squeeze(1) * len(centers)).long()
    return torch.from_numpy(centers.astype(np.float32))[pick] + SPREAD * draws.latents("reals", 2)


@dataclass(frozen=True)
class SeedDraws(Draws):
    """The random numbers of several seeds, those of one seed after those of another: [seeds * n, ...]."""

    _: KW_ONLY
    seeds: tuple[int, ...]

    def noise(self, purpose: str, like: Tensor) -> Tensor:
        return torch.cat([Draws(seed, self.groups, self.size).noise(purpose, like) for seed in self.seeds])

    def _each(self, purpose: str, draw: Callable[[np.random.Generator], np.ndarray]) -> Tensor:
        return torch.cat([Draws(seed, self.groups, self.size)._each(purpose, draw) for seed in self.seeds])


class Crowd(nn.Module):
    """A small network per seed. It takes and returns batches that follow each other, BATCH samples of each seed, once
    or several times over: [k * seeds * BATCH, inputs] -> [k * seeds * BATCH, outputs], or [...] for one output. A
    single network takes a batch of any length."""

    def __init__(self, networks: Sequence[nn.Sequential], before: float = 1.0, after: float = 1.0) -> None:
        super().__init__()
        self.seeds = len(networks)
        self.layers = nn.Sequential(*(_stacked(layers) for layers in zip(*networks, strict=True)))
        self.before = before  # inputs are multiplied by it
        self.after = after  # and outputs

    def forward(self, x: Tensor) -> Tensor:
        turns = len(x) // (self.seeds * BATCH) if self.seeds > 1 else 1
        by_seed = x.view(turns, self.seeds, -1, x.shape[1]).transpose(0, 1).flatten(1, 2)
        made = self.each(by_seed).unflatten(1, (turns, -1)).transpose(0, 1).flatten(0, 2)
        return made.squeeze(1) if made.shape[1] == 1 else made

    def each(self, x: Tensor) -> Tensor:
        """[seeds, n, inputs] -> [seeds, n, outputs]."""
        return self.after * self.layers(self.before * x)


class LinearStack(nn.Module):
    """A linear layer per seed, as one: [seeds, n, inputs] -> [seeds, n, outputs].

    Each seed's biases are filled up with zeros that nothing uses: optimizers change LANES numbers at a time, and round
    what is left over in another way, so that a seed's place would matter.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.outputs = layers[0].out_features
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
        bias = torch.stack([layer.bias.detach() for layer in layers]).unsqueeze(1)
        self.bias = nn.Parameter(nn.functional.pad(bias, (0, -self.outputs % LANES)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias[..., : self.outputs], x, self.weight.mT)


class ChangedStack(nn.Module):
    """The same of layers whose weights are computed, as spectral normalization does, for each by itself."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.stack([layer.weight for layer in self.layers])  # type: ignore[misc]
        bias = torch.stack([layer.bias for layer in self.layers])  # type: ignore[misc]
        return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


def _stacked(layers: Sequence[nn.Module]) -> nn.Module:
    """The layer of all seeds, of those of each."""
    if not isinstance(layers[0], nn.Linear):
        return layers[0]
    return ChangedStack(layers) if is_parametrized(layers[0]) else LinearStack(layers)  # type: ignore[arg-type]


def _networks(seed: int, outputs: int, prepare: Callable[[nn.Module], None] | None) -> tuple[nn.Sequential, ...]:
    """G and D with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        G = _network(LATENT, 2)
        D = _network(2, outputs)
        if prepare:
            prepare(D)
    return G, D


def _network(inputs: int, outputs: int) -> nn.Sequential:
    hidden = [nn.Linear(inputs, WIDTH), nn.LeakyReLU(0.2), nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2)]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, outputs))


def _descend(loss: Tensor, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
    gradients = torch.autograd.grad(loss / BATCH, parameters, materialize_grads=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.contiguous()  # Adam reads it in the order in which the parameter lies in memory
    optimizer.step()
