"""GANs small enough to train many of them: the data are clusters in the plane, the networks have two hidden layers."""

import copy
import math
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from gan.config import RegularizerConfig
from gan.draws import Draws
from gan.methods.critic import Critic, no_critic
from gan.methods.pairs import critic_loss, find_pair, generator_loss
from gan.parts import Part, split_by_turn
from gan.ranks.gradients import GradientSum
from gan.schedules import penalty_turns
from gan.undo import frozen

SPREAD = 0.1  # standard deviation of a cluster
LATENT = 4
WIDTH = 64
BATCH = 256
GROUP = 16
POINTS: dict[str, np.ndarray] = {
    "ring": 2 * np.stack([(math.cos(t), math.sin(t)) for t in 2 * math.pi * np.arange(8) / 8]),
    "grid": np.stack([(x, y) for x in range(-4, 5, 2) for y in range(-4, 5, 2)]).astype(float),
}


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

    modes: the number of clusters with at least 5 samples within three deviations; near: the share of samples within
    three deviations of a cluster; mode_kl: KL(histogram of nearest clusters || uniform); largest: D's largest |score|
    of a fake in the last step, NaN if the samples are not finite. every, share: as in gan.config.RegularizerConfig.
    """
    objective, regularizer = find_pair(objective_name, regularizer_name)
    scale = float(np.abs(centers).max())
    G, D, average = _networks(seed, scale, objective.outputs)
    if regularizer.prepare:
        regularizer.prepare(D)
    adam = partial(torch.optim.Adam, lr=3e-3, betas=(0.0, 0.99))
    g_optimizer = adam(G.parameters())
    d_optimizer = adam(D.parameters())
    noise = math.sqrt(gamma) if regularizer.noise else None
    groups = BATCH // GROUP
    turns = penalty_turns(RegularizerConfig(every=every, share=share), BATCH, math.lcm(GROUP, objective.group))
    largest = 0.0
    for step in range(steps):
        draws = Draws(seed, range(step * groups, (step + 1) * groups), GROUP)
        critic = Critic(D if objective.discriminator else no_critic, draws, noise=noise)
        real = clusters(centers, draws)
        if objective.discriminator:
            d_losses = []
            for part in split_by_turn([Part(real, None, draws)], turns, step, step * BATCH):
                fake = G(part.latents("latents", LATENT)).detach()
                part_critic = replace(critic, draws=part.draws)
                d_losses.append(critic_loss(objective, regularizer, part_critic, part.real, fake, part.due))
            _descend(torch.stack([d_loss.total(gamma / 2 * turns.weight) for d_loss in d_losses]).sum(), D, d_optimizer)
            largest = max(d_loss.fake_scores.abs().max().item() for d_loss in d_losses)
            if regularizer.constrain:
                regularizer.constrain(D, gamma)
        with frozen(D):
            fake = G(draws.latents("latents of the G step", LATENT))
            _descend(generator_loss(objective, critic, real, fake).total(), G, g_optimizer)
        with torch.no_grad():
            for averaged, parameter in zip(average.parameters(), G.parameters(), strict=True):
                averaged.lerp_(parameter, 0.01)
    with torch.no_grad():
        made = average(Draws(seed, range(157), GROUP).latents("samples", LATENT)[:2500])
    return {**describe(made.numpy(), centers), "largest": largest if np.isfinite(made.numpy()).all() else math.nan}


def describe(points: np.ndarray, centers: np.ndarray) -> dict[str, float | int]:
    """The figures modes, near and mode_kl of `train_points`, for points [n, 2]."""
    if not np.isfinite(points).all():
        return {"modes": 0, "near": math.nan, "mode_kl": math.nan}
    distance = np.linalg.norm(points[:, None] - centers[None], axis=2)
    nearest = distance.argmin(1)
    near = distance.min(1) < 3 * SPREAD
    counts = np.bincount(nearest, minlength=len(centers)) / len(points)
    kept = counts[counts > 0]
    good = np.bincount(nearest[near], minlength=len(centers))
    return {
        "modes": int((good >= 5).sum()),
        "near": float(near.mean()),
        "mode_kl": float((kept * np.log(kept * len(centers))).sum()),
    }


def clusters(centers: np.ndarray, draws: Draws) -> Tensor:
    """Draw real points, float32 [n, 2]."""
    pick = (draws.uniform("cluster", 1).squeeze(1) * len(centers)).long()
    return torch.from_numpy(centers.astype(np.float32))[pick] + SPREAD * draws.latents("reals", 2)


class PointGenerator(nn.Module):
    """Latents [n, LATENT] -> points [n, 2]: `scale` times the network's output."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.network = _network(LATENT, 2)

    def forward(self, z: Tensor) -> Tensor:
        return self.scale * self.network(z)


class PointDiscriminator(nn.Module):
    """Points [n, 2] -> logits [n], or [n, outputs] for several outputs."""

    def __init__(self, scale: float, outputs: int) -> None:
        super().__init__()
        self.scale = scale
        self.network = _network(2, outputs)

    def forward(self, points: Tensor) -> Tensor:
        logits = self.network(points / self.scale)
        return logits.squeeze(1) if logits.shape[1] == 1 else logits


def _networks(seed: int, scale: float, outputs: int) -> tuple[PointGenerator, PointDiscriminator, PointGenerator]:
    """G, D and G's average with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        G = PointGenerator(scale)
        D = PointDiscriminator(scale, outputs)
    return G, D, copy.deepcopy(G).requires_grad_(False)


def _network(inputs: int, outputs: int) -> nn.Module:
    hidden = [nn.Linear(inputs, WIDTH), nn.LeakyReLU(0.2), nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2)]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, outputs))


def _descend(loss: Tensor, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    gradients = GradientSum(module.parameters(), BATCH)
    gradients.add(loss)
    gradients.finish()  # not `step`, which would skip an update whose gradient is not finite
    optimizer.step()
