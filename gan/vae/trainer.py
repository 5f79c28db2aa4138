"""The VAE's training step, and its row in the table of families."""

import math
from collections.abc import Hashable, Iterator

import torch
from torch import Tensor

from gan.average import update_averages
from gan.config import TrainConfig, refuse_others
from gan.errors import UserError
from gan.methods.critic import Critic
from gan.methods.pairs import CriticLoss, critic_loss, find_pair
from gan.methods.rows import look_up
from gan.parts import Part, cut_batch
from gan.ranks.statistics import Statistics
from gan.schedules import Moment
from gan.state import Family, StepInputs, Task, TrainState
from gan.undo import undo_step
from gan.vae.bounds import doubly_reparameterized, iwae
from gan.vae.groups import Grouped
from gan.vae.likelihoods import LIKELIHOODS, binarized
from gan.vae.model import VAE, Evidence, build_vae
from gan.vae.posteriors import POSTERIORS, Implicit

FOREIGN = ("data.aug", "optimizer.d_lr", "optimizer.n_critic", "network.minibatch_stddev")
OF_ADVERSARIES = ("objective.", "regularizer.")  # what they do is done to the adversary of an implicit posterior
WITHOUT_TURNS = ("objective.", "regularizer.every", "regularizer.share")  # not even there
OF_CONVOLUTIONS = tuple(
    f"network.{name}" for name in ("widths", "channel", "filter", "class_gain", "recompute", "depth", "residual")
)
LAG = 20  # steps in which the average of squared errors, which makes the scale, forgets half of what it was


def train_step(state: TrainState, task: Task, now: Moment, inputs: StepInputs, stats: Statistics) -> None:
    """One update of encoder, posterior, its adversary if there is one, and decoder; see `gan.state.Step`."""
    config = task.config
    G: VAE = state.networks["VAE"]
    changed = state.changed_by("optimizer")
    before = [tensor.clone() for tensor in changed]
    gradients = task.sum_gradients(G.parameters(), inputs.numbers["stopping"])
    for part in cut_batch(inputs, task, 1.0, G):
        evidence = find_evidence(G, part, config)
        loss = negative_bound(evidence, config, inputs.numbers["beta"])
        stats.add(statistics(evidence, loss))
        total = loss.sum()
        if isinstance(G.posterior, Implicit):
            judged = judge_posterior(G.posterior, evidence, part, config)
            stats.add({"Loss/T/loss": judged.loss})
            total = total + judged.total(inputs.numbers["gamma"] / 2)
        gradients.add(total, evidence.squared_error.sum())
    void = gradients.step(
        state.optimizers["optimizer"], inputs.numbers["optimizer"], torch.zeros_like(state.skipped[0])
    )
    state.stop.copy_(gradients.stop)
    follow_error(G, gradients.along / config.batch, config)
    update_averages(state.flat, state.flat["VAE"], inputs.numbers, void)
    undo_step(before, changed, void)
    state.finish_step(now.images_seen + config.batch, void)


def find_evidence(G: VAE, part: Part, config: TrainConfig) -> Evidence:
    """The evidence of `vae.samples` latents for each image of a part."""
    images = part.real
    if config.vae.binarize:
        coins = part.draws.uniform("black or white", images[0].numel())
        images = binarized(images, coins.to(images).view_as(images))
    k = config.vae.samples
    noise = part.latents("noise of the posterior", k * G.posterior.noise).to(images.dtype)
    noise = noise.unflatten(1, (k, -1)).movedim(1, 0)
    return G.evidence(images, noise, part.labels, stopped=is_doubly(config, G.posterior.has_density))


def is_doubly(config: TrainConfig, has_density: bool) -> bool:
    """Is the doubly reparameterized gradient taken?"""
    wanted = config.vae.gradient == "doubly" or (config.vae.gradient == "auto" and has_density)
    return config.vae.bound == "iwae" and wanted


def negative_bound(evidence: Evidence, config: TrainConfig, beta: Tensor | float) -> Tensor:
    """What is minimized, [N]. beta: weight of the divergence, 1 once the run has warmed up."""
    if config.vae.bound == "elbo":
        divergence = evidence.divergence.clamp(min=config.vae.free_bits * math.log(2))
        return beta * divergence - evidence.log_likelihood.mean(0)
    log_weights = evidence.log_likelihood + beta * (evidence.log_prior - evidence.log_q)
    return doubly_reparameterized(evidence.z, log_weights, beta) if evidence.stopped else -iwae(log_weights)


def judge_posterior(posterior: Implicit, evidence: Evidence, part: Part, config: TrainConfig) -> CriticLoss:
    """The loss of an implicit posterior's adversary: it tells latents, in units of their own mean and deviation,
    from draws of N(0, I), by the configured objective and regularizer.

    At its best it is the logarithm of their ratio (Mescheder et al. 2017, proposition 1).
    """
    objective, regularizer = find_pair(config.objective.name, config.regularizer.name)
    h = evidence.features.detach()
    with torch.no_grad():
        noise = part.latents("noise of the posterior for its adversary", posterior.noise).to(h).unsqueeze(0)
        z = posterior.contrast(noise, h)[1][0]
        from_prior = part.latents("draws of the prior for the adversary", z.shape[1]).to(h)

    def judge(latents: Tensor) -> Tensor:
        return posterior.adversary(latents.unsqueeze(0), h)[0]

    return critic_loss(objective, regularizer, Critic(judge, part.draws), z, from_prior)


@torch.no_grad()
def follow_error(G: VAE, error: Tensor, config: TrainConfig) -> None:
    """With vae.scale=auto, move the likelihood's scale toward the root of a batch's mean squared error, in place. That
    is the scale at which the batch is likeliest (Rybkin et al. 2021, eq. 5)."""
    if config.vae.scale == "auto" and G.likelihood.scale:
        recent = torch.exp(2 * G.log_scale)
        recent = recent.lerp(error.to(recent.dtype).clamp(min=1e-8), 1 - 0.5 ** (1 / LAG))
        G.log_scale.copy_(recent.log() / 2)


def statistics(evidence: Evidence, loss: Tensor) -> dict[str, Tensor]:
    """What a run reports, in nats per image."""
    return {
        "Loss/VAE/loss": loss,
        "Loss/VAE/reconstruction": -evidence.log_likelihood.mean(0),
        "Loss/VAE/divergence": evidence.divergence,
    }


def check(config: TrainConfig) -> None:
    """Raises UserError for settings of other models, and for some that do not go together."""
    refuse_others(config, FOREIGN)
    if config.vae.hidden:
        refuse_others(config, OF_CONVOLUTIONS, "the fully connected layers of vae.hidden (preset vae-dense)")
    size = config.distributed.group
    row = look_up("vae.posterior", config.vae.posterior, POSTERIORS, features=8, d=config.network.z_dim, group=size)
    implicit = isinstance(row, Implicit)
    refuse_others(config, WITHOUT_TURNS if implicit else OF_ADVERSARIES)
    if implicit:
        check_adversary(config)
    if implicit and config.vae.bound == "iwae":
        raise UserError(
            f"vae.bound=iwae needs a posterior's density, and {config.vae.posterior} has none; leave vae.bound out"
        )
    if config.growth.mode != "none":
        raise UserError("growth.mode=progressive: a VAE is trained at its final resolution; give growth.mode=none")
    options = config.vae
    likelihood = LIKELIHOODS[options.likelihood]
    if likelihood.binary and not options.binarize:
        raise UserError(f"vae.likelihood={options.likelihood} is of black and white pixels; give vae.binarize=1 too")
    if options.binarize and not likelihood.binary:
        raise UserError(f"vae.binarize=1 leaves nothing for vae.likelihood={options.likelihood} to tell; leave it out")
    if options.scale != "auto" and not likelihood.scale:
        raise UserError(
            f"vae.scale={options.scale} does nothing with vae.likelihood={options.likelihood}; leave it out"
        )
    if isinstance(row, Grouped) and not (config.data.grouped and options.bound == "elbo"):
        raise UserError(
            f"vae.posterior={options.posterior} shares latents in groups of one class, and bounds them together: give "
            "data.grouped=1 and vae.bound=elbo"
        )
    if options.gradient == "doubly" and not (options.bound == "iwae" and row.has_density):
        raise UserError(
            "vae.gradient=doubly is a gradient of vae.bound=iwae, for posteriors whose density is known everywhere "
            "(diagonal, householder, iaf, coupling); leave it out"
        )
    if options.bound == "iwae" and options.free_bits:
        raise UserError("vae.free_bits is of the divergence, which vae.bound=iwae has none of; leave it out")


def check_adversary(config: TrainConfig) -> None:
    """Raises UserError for a regularizer that an implicit posterior's adversary cannot have."""
    _, regularizer = find_pair(config.objective.name, config.regularizer.name)
    if not regularizer.is_penalty or regularizer.pictures:
        raise UserError(
            f"regularizer.name={config.regularizer.name} is no penalty on points, and an adversary judges latents; "
            "give r1, another gradient penalty, or none"
        )


def remarks(config: TrainConfig) -> Iterator[str]:
    """What is allowed and probably not meant, one line each."""
    if config.vae.bound == "iwae" and config.vae.samples == 1:
        yield "vae.bound=iwae with vae.samples=1 is the ELBO; give vae.samples=5 or more"


def numbers(task: Task, now: Moment) -> dict[str, float]:
    """The divergence's weight, and that of the penalty on an adversary."""
    warmup = 1000 * task.config.vae.warmup_kimg
    beta = min((now.images_seen + task.config.batch) / warmup, 1.0) if warmup else 1.0
    return {"beta": beta, "gamma": task.gamma(now)}


def kind_of_step(task: Task, now: Moment) -> Hashable:
    """All steps are of one kind."""
    return now.stage


VAE_FAMILY = Family(
    networks={"VAE": build_vae},
    generator="VAE",
    optimizers={"optimizer": ("VAE", "g_lr")},
    step=train_step,
    numbers=numbers,
    kind=kind_of_step,
    check=check,
    remarks=remarks,
    coupled=lambda config: 1,
    named_by=lambda config: (config.vae.likelihood, config.vae.posterior),
    status={"loss": "Loss/VAE/loss", "divergence": "Loss/VAE/divergence"},
)
