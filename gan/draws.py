"""Every random number of a run, as a pure function of (seed, purpose, global coupling group).

One counter-based generator per group (Philox, Salmon et al. 2011): its key is made of the run's seed and the purpose,
and the group is the counter's highest word. So a rank draws for its own groups only, and checkpoints hold no generator
state.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def group_generators(seed: int, purpose: str, groups: Iterable[int]) -> Iterator[np.random.Generator]:
    """The generator of each coupling group for one purpose, in turn. The next group takes over the same object: a new
    one would first ask the system for entropy and throw it away, which takes ten times as long as this."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest()
    philox = np.random.Philox(key=int.from_bytes(digest, "little"), counter=0)
    generator = np.random.Generator(philox)
    state = philox.state
    for group in groups:
        state["state"]["counter"][3] = group
        philox.state = state
        yield generator


CPU = torch.device("cpu")


def send(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`. The host does not wait for the copy to a GPU: it is made from page-locked
    memory that is used again only when the copy is complete."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


@dataclass(frozen=True)
class Draws:
    """The random numbers of the coupling groups `groups`, each of `size` samples, as tensors on `device`. Each purpose
    has its own stream."""

    seed: int
    groups: Sequence[int]
    size: int
    device: torch.device = CPU

    def latents(self, purpose: str, z_dim: int) -> Tensor:
        """float32 [len(groups) * size, z_dim], standard normal."""
        return self._each(purpose, lambda rng: rng.standard_normal((self.size, z_dim), dtype=np.float32))

    def coins(self, purpose: str) -> Tensor:
        """bool [len(groups) * size], True with probability 1/2."""
        return self._each(purpose, lambda rng: rng.integers(0, 2, self.size, dtype=np.uint8)).bool()

    def uniform(self, purpose: str, count: int) -> Tensor:
        """float32 [len(groups) * size, count], uniform on [0, 1)."""
        return self._each(purpose, lambda rng: rng.random((self.size, count), dtype=np.float32))

    def noise(self, purpose: str, like: Tensor) -> Tensor:
        """Standard normal [len(groups) * size, ...], with the trailing shape, the dtype and the device of `like`.

        Drawn on that device, where image-sized noise is cheap: it does not depend on the rank, but it differs between
        a CPU and a GPU.
        """
        parts = []
        for numbers in group_generators(self.seed, purpose, self.groups):
            generator = torch.Generator(like.device).manual_seed(int(numbers.integers(2**63)))
            shape = (self.size, *like.shape[1:])
            parts.append(torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device))
        return torch.cat(parts)

    def _each(self, purpose: str, draw: Callable[[np.random.Generator], np.ndarray]) -> Tensor:
        numbers = np.concatenate([draw(rng) for rng in group_generators(self.seed, purpose, self.groups)])
        return send(torch.from_numpy(numbers), self.device)
