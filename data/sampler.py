"""The order of the data: a keyed permutation per epoch, computed sample by sample from (seed, position) alone.

A balanced Feistel network (Luby and Rackoff 1988) permutes the smallest [0, 4**k) that covers the dataset. An output
beyond the dataset is fed back until it falls inside (cycle walking, Black and Rogaway 2002): again a permutation.

Grouped by class, it permutes the records of each class, cuts each class into groups, and permutes all groups.

With blocks of more than one record, for disks that read neighbors much faster, it permutes the blocks of consecutive
records, and another one the records of each block. What is left over is a shorter block, put anywhere among them.
"""

from dataclasses import dataclass

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # increment of splitmix64
ROUNDS = 8
CONSTANTS = GOLDEN * np.arange(ROUNDS + 2, dtype=np.uint64)  # one per round, and two for blocks:
SLOT, INNER = CONSTANTS[ROUNDS:]  # where the shorter one goes; the permutations of their records


def sample_indices(first: int, count: int, length: int, seed: int, block: int = 1) -> np.ndarray:
    """int64 [count]: the dataset indices of the global samples first .. first + count - 1.

    Sample i is position i % length of the permutation of [0, length) that belongs to (seed, epoch i // length). Every
    `block` records from a multiple of `block` on are neighbors in it, in an order of their own: a dataset stored class
    by class then gives batches of few classes.
    """
    if first < 0 or count < 0 or not 1 <= length <= 2**40 or block < 1:
        raise ValueError(
            f"first={first}, count={count} must be >= 0, length={length} in [1, 2**40], block={block} >= 1"
        )
    samples = np.arange(count, dtype=np.uint64) + np.uint64(first)
    epochs, positions = np.divmod(samples, np.uint64(length))
    keys = _mix(_mix(np.full(count, seed % 2**64, np.uint64)) + epochs * GOLDEN)
    if block == 1:
        return _permute(positions, keys, length).astype(np.int64)
    return _permute_blocks(positions, keys, length, min(block, length)).astype(np.int64)


@dataclass(frozen=True)
class ClassGroups:
    """How many groups of `size` records of one class each class has, and where its records are."""

    size: int
    order: np.ndarray  # int64: the records, class by class
    starts: np.ndarray  # int64 [classes]: of each class in `order`
    counts: np.ndarray  # int64 [classes]: records of each
    ends: np.ndarray  # int64 [classes]: groups of a class and those before it

    @staticmethod
    def of(labels: np.ndarray, size: int) -> "ClassGroups":
        """Of records with these labels, int [N]. Raises ValueError if no class has `size` records."""
        counts = np.bincount(labels)
        ends = np.cumsum(counts // size)
        if not len(ends) or ends[-1] == 0:
            raise ValueError(f"no class has {size} records")
        order = np.argsort(labels, kind="stable")
        return ClassGroups(size, order, np.cumsum(counts) - counts, counts, ends)

    def __len__(self) -> int:
        """Samples in an epoch: a class that is no whole number of groups leaves some of its records out, other ones
        each time."""
        return int(self.ends[-1]) * self.size


def grouped_indices(first: int, count: int, groups: ClassGroups, seed: int) -> np.ndarray:
    """int64 [count]: as `sample_indices`, where every `size` samples from a multiple of `size` on have one label."""
    samples = np.arange(first, first + count, dtype=np.uint64)
    epochs, positions = np.divmod(samples, np.uint64(len(groups)))
    keys = _mix(_mix(np.full(count, seed % 2**64, np.uint64)) + epochs * GOLDEN)
    slots, places = np.divmod(positions, np.uint64(groups.size))
    chosen = _permute(slots, keys, int(groups.ends[-1])).astype(np.int64)
    classes = np.searchsorted(groups.ends, chosen, side="right")
    within = chosen - (groups.ends - groups.counts // groups.size)[classes]  # the group's number in its class
    ranks = (within * groups.size).astype(np.uint64) + places
    inner = _mix(keys + INNER ^ _mix(classes.astype(np.uint64)))
    for label in np.unique(classes):
        mine = classes == label
        ranks[mine] = _permute(ranks[mine], inner[mine], int(groups.counts[label]))
    return groups.order[groups.starts[classes] + ranks.astype(np.int64)]


def _permute_blocks(positions: np.ndarray, keys: np.ndarray, length: int, block: int) -> np.ndarray:
    """Permute the whole blocks among each other, and each block in itself; uint64 [n], a key for each."""
    size = np.uint64(block)
    whole, rest = (np.uint64(part) for part in divmod(length, block))
    slot = _mix(keys + SLOT) % (whole + np.uint64(1))  # how many whole blocks come before the shorter one
    behind = positions >= slot * size + rest
    inside = ~behind & (positions >= slot * size)  # in the shorter block; nowhere if there is none
    order, offsets = np.divmod(positions - np.where(behind, rest, 0).astype(np.uint64), size)
    blocks = np.where(inside, whole, order)
    blocks[~inside] = _permute(order[~inside], keys[~inside], int(whole))
    inner = _mix(keys + INNER ^ _mix(blocks))
    for members, records in ((~inside, block), (inside, int(rest))):
        offsets[members] = _permute(offsets[members], inner[members], records)
    return blocks * size + offsets


def _permute(positions: np.ndarray, keys: np.ndarray, length: int) -> np.ndarray:
    """Permute each of the uint64 positions [n] in [0, length) under its own key."""
    positions = positions.copy()
    keys = _mix(keys + CONSTANTS[:ROUNDS, None])  # [rounds, n]
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    outside = np.arange(len(positions))
    while len(outside):
        positions[outside] = _feistel(positions[outside], keys[:, outside], half)
        outside = outside[positions[outside] >= length]
    return positions


def _feistel(values: np.ndarray, keys: np.ndarray, half: int) -> np.ndarray:
    """Permute each of the uint64 values [n] in [0, 4**half) under its own column of the keys [rounds, n]."""
    shift = np.uint64(half)
    mask = np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(key ^ right) & mask)
    return left << shift | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The splitmix64 finalizer (Stafford's variant 13): uint64 -> uint64, one to one, any bit depends on all."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
