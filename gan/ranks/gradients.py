"""The gradient over a global batch: summed over this rank's parts of the batch, then over all ranks.

The sum is divided by the batch and not by the number of ranks, so that ranks may have unequal shares. It is sent as one
flat message after the backward pass. Most gradients are complete only near its end, in the last of D's passes (reals,
fakes, penalty), and sending them in buckets from there on was no faster on two ranks (docs/benchmarks.md).
"""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from gan.config import DistributedConfig
from gan.ranks.capture import outside
from gan.ranks.distributed import Ranks, share

Node = tuple[int, int, Tensor]  # (level, index, sum of the leaves [index * 2**level, (index + 1) * 2**level))
ALONE = Ranks()
PLAIN = DistributedConfig()


class GradientSum:
    """The gradient of one player's loss over the global batch: `add` the loss of each part, then `step`.

    parameters: of the network that the loss trains. batch: samples in the global batch.
    blocks: how many blocks the global batch has. In exact mode every part is one block.
    stopping: a number of this rank that is sent along with the gradients; its sum over ranks is then in `stop`.
    Each part too may send a number along; the sum over the global batch is then in `along`.
    Parameters that no loss depends on get no gradient.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        batch: int,
        blocks: int = 1,
        ranks: Ranks = ALONE,
        how: DistributedConfig = PLAIN,
        stopping: Tensor | float = 0.0,
    ) -> None:
        self.parameters = list(parameters)
        self.batch = batch
        self.ranks = ranks
        self.how = how
        self.blocks = blocks
        self.stopping = stopping
        self.stop = torch.zeros(())  # 0-dim float32, the same on all ranks after `finish`
        self.along = torch.zeros(())  # as `stop`
        self.sent: Tensor | float = 0.0  # along with this rank's parts, or in exact mode with its current one
        self.leaves = iter(share(blocks, ranks))
        self.nodes: list[Node] = []
        self._clear()

    def add(self, loss: Tensor, along: Tensor | float = 0.0) -> None:
        """Run the backward pass of a part's loss, 0-dim, the sum over its samples. This frees the loss's graph.

        along: a number of this part, 0-dim, that is summed over all parts beside the gradients.
        """
        if self.how.exact:
            self._clear()
        self.sent = self.sent + along
        torch.autograd.backward(loss, inputs=self.parameters)  # not into the images that a penalty differentiates by
        if self.how.exact:
            self._add_leaf()

    def finish(self) -> Tensor:
        """Set each .grad to the sum over all ranks, divided by the global batch. -> 0-dim float32: 1 if a gradient on
        any rank, or a number sent along, is not finite, else 0. All ranks get the same, without a further message, as
        they have the same sum."""
        flat = self._sum_in_tree() if self.how.exact else self._sum_flat()
        void = 1 - torch.isfinite(flat).all().float()
        self.stop, self.along = flat[-2:].float().unbind()
        flat = flat[:-2] / self.batch
        start = 0
        for p in self.parameters:
            if p.grad is not None:
                p.grad = flat.as_strided(p.shape, p.stride(), start)
                start += p.numel()
        return void

    def step(self, optimizer: torch.optim.Optimizer, lr: Tensor | float, void: Tensor) -> Tensor:
        """`finish`, then `descend`, unless a gradient is not finite or `void` is 1. -> 0-dim: 1 in these cases, else
        0."""
        void = torch.maximum(self.finish(), void)
        descend(optimizer, lr, void)
        return void

    def _clear(self) -> None:
        for p in self.parameters:
            p.grad = None

    def _add_leaf(self) -> None:
        index = next(self.leaves)
        leaf = pack(self.parameters, self.stopping, self.sent)
        self.stopping = 0.0  # the first leaf carries it; the others must not count it again
        self.sent = 0.0
        push(self.nodes, (0, index, leaf))

    def _sum_flat(self) -> Tensor:
        flat = pack(self.parameters, self.stopping, self.sent)
        if self.ranks.world > 1:
            outside(partial(SUMS[self.how.compress], flat, self.ranks))
        return flat

    def _sum_in_tree(self) -> Tensor:
        nodes = exchange(self.nodes, self.blocks, self.ranks) if self.ranks.world > 1 else self.nodes
        total = nodes.pop()[2]
        while nodes:  # several nodes are left unless the number of blocks is a power of two
            total = nodes.pop()[2] + total
        return total


def descend(optimizer: torch.optim.Optimizer, lr: Tensor | float, void: Tensor) -> None:
    """Update an optimizer's parameters with learning rate `lr`, or change nothing if `void` is 1.

    The fused Adam reads `found_inf` on the device, so the host does not wait for the value.
    """
    for group in optimizer.param_groups:
        group["lr"].copy_(torch.as_tensor(lr, dtype=group["lr"].dtype))
    optimizer.found_inf = void  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.step()


def pack(parameters: Sequence[Tensor], *numbers: Tensor | float) -> Tensor:
    """One flat tensor of all gradients in memory order, followed by the numbers, 0-dim each."""
    gradients = [p.grad.as_strided((p.numel(),), (1,)) for p in parameters if p.grad is not None]
    like = gradients[0]
    last = [n.to(like.dtype).view(1) if isinstance(n, Tensor) else like.new_full((1,), n) for n in numbers]
    return torch.cat([*gradients, *last])


def _sum(flat: Tensor, ranks: Ranks) -> None:
    dist.all_reduce(flat)


def _sum_bfloat16(flat: Tensor, ranks: Ranks) -> None:
    """Sum over ranks with half the bytes: each rank receives one piece from all ranks in bfloat16, sums it in the dtype
    of `flat`, and sends the sum to all ranks in bfloat16.

    So values are rounded to 8 significant bits twice, before and after the sum, for any number of ranks, and all ranks
    get the same result. An all-reduce in bfloat16 would round at each addition.
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
    """Append a node to the right of `nodes`. Two siblings are replaced by their parent, and so on upward.

    A node of this tree is the sum of its two children, on whichever rank it is computed. So the sum of all leaves is
    bit-equal for any number of ranks: each rank adds up the nodes whose leaves it has, and all ranks add up the rest.
    """
    level, index, total = node
    while index % 2 and nodes and nodes[-1][:2] == (level, index - 1):
        total = nodes.pop()[2] + total
        level += 1
        index //= 2
    nodes.append((level, index, total))


def exchange(mine: list[Node], count: int, ranks: Ranks) -> list[Node]:
    """Exchange the nodes that each rank has computed. -> the nodes of the whole tree, the same on all ranks."""
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
