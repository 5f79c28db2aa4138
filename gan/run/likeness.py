"""Watches, tick by tick, whether the generator's images become more alike than real ones: the beginning of a collapse,
which no loss shows."""

from collections.abc import Iterable, Iterator
from contextlib import closing

import torch

from gan.metrics.diversity import LEAST_SPREAD, MOST_COHERENCE, Diversity, diversity, no_images, sums
from gan.sampling import generate, seed_latents, to_uint8
from gan.schedules import Moment
from gan.state import Batch, Feed, Task, TrainState

FAKES = 256  # images of fixed latents that are looked at, by all ranks together
REALS = 1024
CHUNK = 16  # images that one rank makes or reads at a time: the same ones whatever the number of ranks
MOST_CLASSES = 64  # that fixed latents are made for, so that each has a few images
EARLY = 0.1  # share of the run in which images are alike because G has learned little yet
REPEAT = 10  # ticks after which a warning is given again


class Likeness:
    """Compares the images of fixed latents, by the averaged generator, with the first real images of the run."""

    def __init__(self, task: Task, feed: Feed):
        self.task = task
        self.feed = feed
        self.reals: dict[int, Diversity] = {}  # by stage
        self.quiet = 0  # ticks without a warning that are to come

    def tick(self, state: TrainState, now: Moment) -> dict[str, float]:
        """Coherence and spread of both, within classes if the run is conditional. All ranks call it, and get the
        same."""
        if now.stage not in self.reals:
            self.reals[now.stage] = self._diversity(self._real_batches(now.stage), now.stage)
        fakes = self._diversity(self._fake_batches(state, now), now.stage)
        reals = self.reals[now.stage]
        return {
            "Diversity/coherence": fakes.coherence,
            "Diversity/coherence_of_reals": reals.coherence,
            "Diversity/spread": fakes.spread,
            "Diversity/spread_of_reals": reals.spread,
        }

    def warnings(self, found: dict[str, float], now: Moment) -> Iterator[str]:
        """What to say of a tick's figures, if there are any: usually nothing. Nothing while a stage fades in, when the
        average of its parameters is young."""
        if not found or now.fading or not self.task.family.collapses:
            return
        coherence, real_coherence, spread, real_spread = found.values()
        alike = coherence > MOST_COHERENCE * real_coherence or spread < LEAST_SPREAD * real_spread
        self.quiet = max(self.quiet - 1, 0) if alike else 0
        if alike and not self.quiet and now.images_seen > EARLY * self.task.schedule.total:
            self.quiet = REPEAT
            where = " within classes" if self.task.config.data.cond else ""
            yield (
                f"warning: images are too much alike{where}: coherence {coherence:.2f}, of reals {real_coherence:.2f} "
                f"(limit: {MOST_COHERENCE:g} times that); spread {spread / max(real_spread, 1e-9):.2f} of theirs "
                f"(limit: {LEAST_SPREAD:g}). Look at the newest grid; if G has collapsed, raise regularizer.gamma"
            )

    def _fake_batches(self, state: TrainState, now: Moment) -> Iterator[Batch]:
        G = state.networks[self.task.family.average]
        for first in self._chunks(FAKES):
            seeds = range(first, first + CHUNK)
            labels = torch.tensor(seeds) % min(G.classes, MOST_CLASSES) if G.classes else None
            z = seed_latents(seeds, G.z_dim)
            images = generate(G, z, labels, stage=now.stage, alpha=now.alpha, check=False)  # as in `fake_grid`
            yield to_uint8(images), None if labels is None else labels.numpy()

    def _real_batches(self, stage: int) -> Iterator[Batch]:
        with closing(self.feed((first, CHUNK, stage) for first in self._chunks(REALS))) as batches:
            yield from batches

    def _chunks(self, count: int) -> range:
        """The first image of each of this rank's chunks."""
        return range(0, count, CHUNK)[self.task.ranks.rank :: self.task.ranks.world]

    def _diversity(self, batches: Iterable[Batch], stage: int) -> Diversity:
        """Of the batches of all ranks."""
        images = self.task.images
        classes = len(images.class_names) if self.task.config.data.cond else 1
        total = no_images((*images.size(stage), images.channels), classes)
        for pixels, labels in batches:
            groups = torch.zeros(len(pixels)) if labels is None or classes == 1 else torch.from_numpy(labels)
            total += sums(torch.from_numpy(pixels), groups.long(), classes)
        return diversity(total.over_ranks(self.task.ranks.device))
