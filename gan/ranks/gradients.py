"""The sum of gradients over a global batch that was cut into parts, on this rank and over all ranks.

Divided by the batch and not by the ranks, so ranks may hold unequal shares. One flat message per sum, after the
backward: most gradients are whole only near its end, where the last of D's passes (reals, fakes, penalty) is walked
back, and buckets that were sent from there on won nothing on two ranks (docs/benchmarks.md).
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gan.config import DistributedConfig
from gan.ranks.distributed import Ranks, share

Node = tuple[int, int, Tensor]  # (level, index, sum): of the leaves [index * 2**level, (index + 1) * 2**level)


def sum_gradients(
    parameters: Sequence[Tensor],
    totals: Iterable[Tensor],
    batch: int,
    ranks: Ranks,
    how: DistributedConfig,
    blocks: int,
    stopping: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Put the gradient of the sum of `totals` over all ranks / global batch into each .grad.

    totals: the losses of this rank's parts, each computed when the graph of the one before is gone; in exact mode a
    part is one of the `blocks` of the global batch. Parameters that no total depends on keep no gradient.
    -> 0-dim float32 tensors, alike on all ranks because the sum carries them without a message of their own: 1 where a
    gradient on any rank is not finite, else 0; and the sum over ranks of `stopping`.
    """
    for p in parameters:
        p.grad = None
    if how.exact:
        flat = sum_in_tree(_each_alone(parameters, totals, stopping), blocks, ranks)
    else:
        for total in totals:
            torch.autograd.backward(total, inputs=parameters)  # not into the images a penalty looked at
        flat = _pack(parameters, stopping)
        if ranks.world > 1:
            SUMS[how.compress](flat, ranks)
    flat, stop = flat[:-1] / batch, flat[-1].float()
    gradients = [p.grad for p in parameters if p.grad is not None]
    pieces = flat.split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [piece.view_as(g) for piece, g in zip(pieces, gradients, strict=True)])
    return 1 - torch.isfinite(flat).all().float(), stop


def _each_alone(parameters: Sequence[Tensor], totals: Iterable[Tensor], stopping: float) -> Iterator[Tensor]:
    """The gradient of each total; the wish to stop goes with the first. The last one's stay in .grad."""
    for index, total in enumerate(totals):
        for p in parameters:
            p.grad = None
        torch.autograd.backward(total, inputs=parameters)
        yield _pack(parameters, stopping if index == 0 else 0.0)


def _pack(parameters: Sequence[Tensor], extra: float) -> Tensor:
    """All gradients in a row, and one number behind them."""
    gradients = [p.grad.flatten() for p in parameters if p.grad is not None]
    return torch.cat([*gradients, gradients[0].new_full((1,), extra)])


def _sum(flat: Tensor, ranks: Ranks) -> None:
    dist.all_reduce(flat)


def _sum_bfloat16(flat: Tensor, ranks: Ranks) -> None:
    """Half the bytes: each rank sums its piece of what all sent, in the type of `flat`, and sends that to all.

    Rounded to 8 significant bits twice, by whom it comes from and as a sum, however many ranks there are; the same on
    all of them. An all-reduce in bfloat16 would round at each addition.
    """
    size = -(-len(flat) // ranks.world)
    sent = torch.nn.functional.pad(flat, (0, size * ranks.world - len(flat))).bfloat16()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    piece = received.view(ranks.world, size).to(flat.dtype).sum(0).bfloat16()
    dist.all_gather(list(sent.split(size)), piece)
    flat.copy_(sent[: len(flat)])


SUMS = {"none": _sum, "bf16": _sum_bfloat16}  # rows of distributed.compress


def sum_in_tree(mine: Iterable[Tensor], count: int, ranks: Ranks) -> Tensor:
    """The sum of `count` leaves, `mine` those of this rank's share, bit for bit the same for any number of ranks.

    A node of the tree is the sum of its two children, whoever computes it: each rank as far as it has whole nodes, and
    all of them the rest.
    """
    nodes: list[Node] = []
    for index, leaf in zip(share(count, ranks), mine, strict=True):
        push(nodes, (0, index, leaf))
    if ranks.world > 1:
        nodes = _exchange(nodes, count, ranks)
    total = nodes.pop()[2]
    while nodes:  # `count` is no power of two
        total = nodes.pop()[2] + total
    return total


def push(nodes: list[Node], node: Node) -> None:
    """Put a node to the right of those there are; a pair of siblings becomes their parent, and so on upward."""
    level, index, total = node
    while index % 2 and nodes and nodes[-1][:2] == (level, index - 1):
        total = nodes.pop()[2] + total
        level, index = level + 1, index // 2
    nodes.append((level, index, total))


def _exchange(mine: list[Node], count: int, ranks: Ranks) -> list[Node]:
    """The whole tree, on all ranks, from what each of them has of it."""
    whole: list[Node] = []
    for rank in range(ranks.world):
        theirs: list[Node] = []
        for index in share(count, Ranks(rank, ranks.world)):
            push(theirs, (0, index, torch.zeros(())))
        for number, (level, index, _) in enumerate(theirs):
            total = mine[number][2] if rank == ranks.rank else torch.empty_like(mine[0][2])
            dist.broadcast(total, rank)
            push(whole, (level, index, total))
    return whole
