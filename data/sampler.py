"""The order of the data: a keyed permutation per epoch, computed sample by sample from (seed, position) alone.

A balanced Feistel network (Luby and Rackoff 1988) permutes the smallest [0, 4**k) that covers the dataset. An output
beyond the dataset is fed back until it falls inside (cycle walking, Black and Rogaway 2002): again a permutation.
"""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # increment of splitmix64
ROUND_CONSTANTS = GOLDEN * np.arange(8, dtype=np.uint64)  # one per round


def sample_indices(first: int, count: int, length: int, seed: int) -> np.ndarray:
    """int64 [count]: the dataset indices of the global samples first .. first + count - 1.

    Sample i is position i % length of the permutation of [0, length) that belongs to (seed, epoch i // length).
    """
    if first < 0 or count < 0 or not 1 <= length <= 2**40:
        raise ValueError(f"first={first}, count={count} must be >= 0 and length={length} in [1, 2**40]")
    samples = np.arange(count, dtype=np.uint64) + np.uint64(first)
    epochs, positions = np.divmod(samples, np.uint64(length))
    keys = _mix(_mix(np.full(count, seed % 2**64, np.uint64)) + epochs * GOLDEN)
    keys = _mix(keys + ROUND_CONSTANTS[:, None])  # [rounds, count]
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    outside = np.arange(count)
    while len(outside):
        positions[outside] = _feistel(positions[outside], keys[:, outside], half)
        outside = outside[positions[outside] >= length]
    return positions.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, half: int) -> np.ndarray:
    """Permute each of the uint64 values [n] in [0, 4**half) under its own column of the keys [rounds, n]."""
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(key ^ right) & mask)
    return left << shift | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The splitmix64 finalizer (Stafford's variant 13): uint64 -> uint64, one to one, any bit depends on all."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
