"""The order of the data: a keyed permutation per epoch, computed sample by sample from (seed, position) alone.

A balanced Feistel network (Luby and Rackoff 1988) permutes the smallest [0, 4**k) that covers the dataset. An output
beyond the dataset is fed back until it falls inside (cycle walking, Black and Rogaway 2002): again a permutation.

With blocks of more than one record, for disks that read neighbors much faster, it permutes the blocks of consecutive
records, and another one the records of each block. What is left over is a shorter block, put anywhere among them.
"""

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
