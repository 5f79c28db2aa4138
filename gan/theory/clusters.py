"""GANs small enough to compare by the dozen: clusters in the plane, and two networks of two hidden layers."""

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from gan.draws import Draws
from gan.methods.pairs import critic_loss, find_pair
from gan.trainer import frozen, total_over_samples

SPREAD, LATENT, WIDTH, BATCH = 0.1, 4, 64, 256
POINTS: dict[str, np.ndarray] = {
    "ring": 2 * np.stack([(math.cos(t), math.sin(t)) for t in 2 * math.pi * np.arange(8) / 8]),
    "grid": np.stack([(x, y) for x in range(-4, 5, 2) for y in range(-4, 5, 2)]).astype(float),
}


def train_points(
    objective_name: str, regularizer_name: str, gamma: float, centers: np.ndarray, seed: int, steps: int
) -> dict[str, float | int]:
    """Train on Gaussian clusters of deviation SPREAD about `centers` [modes, 2]; -> what the averaged generator makes.

    modes: clusters that at least 5 of 2500 samples are within three deviations of; near: the share of samples that are
    near any; mode_kl: KL(nearest-cluster histogram || uniform); largest: the largest |score| of the last step, NaN
    where values stopped being finite.
    """
    objective, regularizer = find_pair(objective_name, regularizer_name)
    scale = float(np.abs(centers).max())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        G, D = _net(LATENT, 2), _net(2, objective.outputs)
        average = _net(LATENT, 2).requires_grad_(False)
        average.load_state_dict(G.state_dict())
        if regularizer.prepare:
            regularizer.prepare(D)
    adam = partial(torch.optim.Adam, lr=3e-3, betas=(0.0, 0.99))
    g_optimizer, d_optimizer = adam(G.parameters()), adam(D.parameters())

    def critic(x: Tensor, purpose: str) -> Tensor:
        if objective.discriminator is None:
            return x
        if regularizer.noise:
            x = x + math.sqrt(gamma) * draws.noise(f"instance noise: {purpose}", x)
        return D(x / scale).squeeze(1) if objective.outputs == 1 else D(x / scale)

    groups, largest = BATCH // 16, 0.0
    for step in range(steps):
        draws = Draws(seed, range(step * groups, (step + 1) * groups), 16)
        real, z = clusters(centers, draws), draws.latents("latents", LATENT)
        real_outputs = real
        if objective.discriminator:
            d = critic_loss(objective, regularizer, critic, real, scale * G(z).detach(), draws)
            loss = total_over_samples(d.loss, BATCH) + sum(gamma / 2 * p.sum() for p in d.penalties)
            _descend(loss / BATCH, D, d_optimizer)
            if regularizer.constrain:
                regularizer.constrain(D, gamma)
            real_outputs, largest = d.real_outputs.detach(), d.fake_scores.abs().max().item()
        with frozen(D):
            real_outputs = critic(real.detach(), "reals of the G step") if objective.paired else real_outputs
            fake = scale * G(draws.latents("latents of the G step", LATENT))
            loss = total_over_samples(objective.generator(real_outputs, critic(fake, "fakes of the G step")), BATCH)
            _descend(loss / BATCH, G, g_optimizer)
        with torch.no_grad():
            for a, p in zip(average.parameters(), G.parameters(), strict=True):
                a.lerp_(p, 0.01)
    with torch.no_grad():
        made = scale * average(Draws(seed, range(157), 16).latents("samples", LATENT)[:2500])
    return {**describe(made.numpy(), centers), "largest": largest if np.isfinite(made.numpy()).all() else math.nan}


def describe(points: np.ndarray, centers: np.ndarray) -> dict[str, float | int]:
    """modes, near and mode_kl, as above, of points [n, 2]."""
    if not np.isfinite(points).all():
        return {"modes": 0, "near": math.nan, "mode_kl": math.nan}
    distance = np.linalg.norm(points[:, None] - centers[None], axis=2)
    nearest, near = distance.argmin(1), distance.min(1) < 3 * SPREAD
    counts = np.bincount(nearest, minlength=len(centers)) / len(points)
    kept = counts[counts > 0]
    good = np.bincount(nearest[near], minlength=len(centers))
    return {
        "modes": int((good >= 5).sum()),
        "near": float(near.mean()),
        "mode_kl": float((kept * np.log(kept * len(centers))).sum()),
    }


def clusters(centers: np.ndarray, draws: Draws) -> Tensor:
    """Reals, float32 [n, 2]."""
    pick = (draws.uniform("cluster", 1).squeeze(1) * len(centers)).long()
    return torch.from_numpy(centers.astype(np.float32))[pick] + SPREAD * draws.latents("reals", 2)


def _net(inputs: int, outputs: int) -> nn.Module:
    hidden = [nn.Linear(inputs, WIDTH), nn.LeakyReLU(0.2), nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2)]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, outputs))


def _descend(loss: Tensor, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss, inputs=list(module.parameters()))
    optimizer.step()
