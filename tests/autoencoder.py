"""A second kind of model, as small as one can be: an autoencoder. Run as a program it trains one.

autoencoder.py OUTDIR
"""

import sys
from pathlib import Path

import torch
from tiny import tiny_config, tiny_feed, tiny_format

from gan.average import update_averages
from gan.families import FAMILIES
from gan.networks import build_discriminator, build_generator
from gan.parts import cut_batch, fade_weight
from gan.ranks.distributed import Ranks
from gan.ranks.gradients import descend
from gan.run.directories import hold, open_run
from gan.run.plan import RunPlan, plan_run
from gan.run.training import train_run
from gan.state import Family


def step(state, task, now, inputs, stats):
    G = state.networks["G"]
    E = state.networks["E"]
    config = task.config
    numbers = inputs.numbers
    alpha = fade_weight(now, inputs)
    gradients = task.sum_gradients([*G.parameters(), *E.parameters()], numbers["stopping"])
    for part in cut_batch(inputs, task, alpha, G):
        rebuilt = G(E(part.real, now.stage, alpha), now.stage, alpha)
        error = (rebuilt - part.real).square().mean((1, 2, 3))
        stats.add({"Loss/error": error})
        gradients.add(error.sum())
    void = gradients.finish()
    state.stop.copy_(gradients.stop)
    for name, optimizer in state.optimizers.items():
        descend(optimizer, numbers[name], void)
    update_averages(state.flat, state.flat["G"], numbers, void)
    state.finish_step(now.images_seen + config.batch, void)


AUTOENCODER = Family(
    networks={
        "G": build_generator,
        "E": lambda config, images: build_discriminator(config, images, outputs=config.network.z_dim),
    },
    generator="G",
    optimizers={"g_optimizer": ("G", "g_lr"), "e_optimizer": ("E", "g_lr")},
    step=step,
    kind=lambda task, now: (now.stage, now.fading),
    check=lambda config: None,
    remarks=lambda config: (),
    coupled=lambda config: 1,
    named_by=lambda config: ("autoencoder",),
    status={"error": "Loss/error"},
)
FAMILIES["autoencoder"] = AUTOENCODER


def autoencoder_plan() -> RunPlan:
    return plan_run(tiny_config({"model": "autoencoder", "run.keep": 9}), tiny_format(), "tiny", "none")


def main() -> None:
    torch.set_num_threads(1)
    plan = autoencoder_plan()
    run = open_run(plan, Path(sys.argv[1]))
    with hold(run):
        sys.exit(train_run(plan, run, tiny_feed, Ranks()))


if __name__ == "__main__":
    main()
