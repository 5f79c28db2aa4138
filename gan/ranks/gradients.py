"""The sum of gradients over a global batch that was cut into parts, on this rank and over all ranks.

Divided by the batch and not by the ranks, so ranks may hold unequal shares. One flat message per sum, after the
backward: most gradients are whole only near its end, where the last of D's passes (reals, fakes, penalty) is walked
back, and buckets that were sent from there on won nothing on two ranks (docs/benchmarks.md).
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gan.config import DistributedConfig
from gan.ranks.distributed import Ranks, share

Node = tuple[int, int, Tensor]  # (level, index, sum): of the leaves [index * 2**level, (index + 1) * 2**level)
ALONE = Ranks()
PLAIN = DistributedConfig()


class GradientSum:
    """The gradient of one player's loss over the global batch: `add` the loss of each part, then `step`.

    parameters: of the network that the loss trains. batch: samples in the global batch.
    blocks: how many blocks the global batch is made of. In exact mode every part is one of them.
    stopping: a number of this rank's own that travels with the gradients; `stop` is then its sum over ranks.
    Parameters that no loss depends on keep no gradient.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        batch: int,
        blocks: int = 1,
        ranks: Ranks = ALONE,
        how: DistributedConfig = PLAIN,
        stopping: float = 0.0,
    ) -> None:
        self.parameters = list(parameters)
        self.batch = batch
        self.ranks = ranks
        self.how = how
        self.blocks = blocks
        self.stopping = stopping
        self.stop = torch.zeros(())  # 0-dim float32, alike on all ranks once they have summed
        self.leaves = iter(share(blocks, ranks))
        self.nodes: list[Node] = []
        self._clear()

    def add(self, loss: Tensor) -> None:
        """Backward of a part's loss, 0-dim: a sum over its samples. Its graph is gone afterwards."""
        if self.how.exact:
            self._clear()
        torch.autograd.backward(loss, inputs=self.parameters)  # not into the images that a penalty looked at
        if self.how.exact:
            self._add_leaf()

    def finish(self) -> Tensor:
        """Put the sum over all ranks / global batch into each .grad. -> 0-dim float32, alike on all ranks: 1 where a
        gradient on any of them is not finite, else 0. It comes with the sum, without a message of its own."""
        flat = self._sum_in_tree() if self.how.exact else self._sum_flat()
        self.stop = flat[-1].float()
        flat = flat[:-1] / self.batch
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        pieces = flat.split([g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [piece.view_as(g) for piece, g in zip(pieces, gradients, strict=True)])
        return 1 - torch.isfinite(flat).all().float()

    def step(self, optimizer: torch.optim.Optimizer, lr: float, void: Tensor) -> Tensor:
        """`finish`, and `descend` unless a gradient is not finite or `void` is 1. -> 0-dim: is one of these so?"""
        void = torch.maximum(self.finish(), void)
        descend(optimizer, lr, void)
        return void

    def _clear(self) -> None:
        for p in self.parameters:
            p.grad = None

    def _add_leaf(self) -> None:
        index = next(self.leaves)
        leaf = pack(self.parameters, self.stopping)
        self.stopping = 0.0  # it goes with the first leaf
        push(self.nodes, (0, index, leaf))

    def _sum_flat(self) -> Tensor:
        flat = pack(self.parameters, self.stopping)
        if self.ranks.world > 1:
            SUMS[self.how.compress](flat, self.ranks)
        return flat

    def _sum_in_tree(self) -> Tensor:
        nodes = exchange(self.nodes, self.blocks, self.ranks) if self.ranks.world > 1 else self.nodes
        total = nodes.pop()[2]
        while nodes:  # the number of blocks is no power of two
            total = nodes.pop()[2] + total
        return total


def descend(optimizer: torch.optim.Optimizer, lr: float, void: Tensor) -> None:
    """Update an optimizer's parameters at a learning rate, or change nothing where `void` is 1.

    The fused Adam reads `found_inf` on the device, so nobody waits for the answer.
    """
    for group in optimizer.param_groups:
        group["lr"].fill_(lr)
    optimizer.found_inf = void  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.step()


def pack(parameters: Sequence[Tensor], extra: float) -> Tensor:
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


def push(nodes: list[Node], node: Node) -> None:
    """Put a node to the right of those there are; a pair of siblings becomes their parent, and so on upward.

    A node of this tree is the sum of its two children, whoever computes it. So the sum of all leaves is bit for bit the
    same for any number of ranks: each sums as far as it has whole nodes, and all of them sum the rest.
    """
    level, index, total = node
    while index % 2 and nodes and nodes[-1][:2] == (level, index - 1):
        total = nodes.pop()[2] + total
        level += 1
        index //= 2
    nodes.append((level, index, total))


def exchange(mine: list[Node], count: int, ranks: Ranks) -> list[Node]:
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
