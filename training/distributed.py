"""A rank of several that train one network together (`blink train --ddp`), and what it does with the others.

The batch stays whole: every rank draws the same epoch, takes its slice of each batch, and what is computed of a batch
is summed over the ranks, slices of unequal size included, as only sums are exchanged and no means. So a step is that of
one process but for the order in which float32 sums are added.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor

from blink.errors import UserError, brief
from blink.kernels._synchronized import Lost, all_gather, collective, synchronized
from blink.training.peers import GO_ON, Peers


@dataclass(frozen=True)
class Ranks:
    """This rank of `size`; group: for collectives, which all ranks call in the same order. `ALONE` calls none.

    Every method raises UserError where another rank is gone.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def share(self, count: int) -> slice:
        """This rank's part of `count` in a row; no two differ by more than one."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def owners(self, costs: list[int]) -> list[int]:
        """A rank for each piece of work, so that their shares are as equal as taking the largest first makes them."""
        loads, owners = [0] * self.size, [0] * len(costs)
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owners[i] = loads.index(min(loads))
            loads[owners[i]] += costs[i]
        return owners

    def statistics(self, local: int, total: int) -> AbstractContextManager:
        """Inside, batch normalization is over a batch of `total` images, `local` of which are here."""
        return nullcontext() if self.size == 1 else self._synchronized(local, total)

    @contextmanager
    def _synchronized(self, local: int, total: int) -> Iterator[None]:
        with self._together(), synchronized(self.group, local, total):
            yield

    def summed(self, tensors: list[Tensor]) -> list[Tensor]:
        """The sums over all ranks, in float32 at least, by one collective."""
        if self.size == 1:
            return tensors
        flat = _flat(tensors, reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32))
        with self._together(), collective():
            dist.all_reduce(flat, group=self.group)
        return [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors)]

    def sum_(self, *tensors: Tensor) -> None:
        """In place."""
        for tensor in tensors if self.size > 1 else ():
            with self._together(), collective():
                dist.all_reduce(tensor, group=self.group)

    def least_(self, tensor: Tensor) -> None:
        """The smallest of all ranks' elements, in place."""
        if self.size > 1:
            with self._together(), collective():
                dist.all_reduce(tensor, dist.ReduceOp.MIN, self.group)

    def rows(self, compute: Callable[[slice], Tensor], count: int) -> Tensor:
        """compute(slice) of `count` rows in a row, of which each rank computes its share, one row at least."""
        if self.size == 1 or count < self.size:
            return compute(slice(0, count))
        mine = compute(self.share(count))
        most = -(-count // self.size)
        padded = mine.new_zeros(most, *mine.shape[1:])
        padded[: len(mine)] = mine
        every = mine.new_empty(self.size * most, *mine.shape[1:])
        with self._together(), collective():
            all_gather(every, padded, self.group)
        shares = [Ranks(rank, self.size).share(count) for rank in range(self.size)]
        return torch.cat([part[: share.stop - share.start] for part, share in zip(every.split(most), shares)])

    def exchange(self, tensors: list[Tensor], owners: list[int]) -> None:
        """Give all ranks each tensor as its owner has it, in place, by one collective."""
        if self.size == 1 or not tensors:
            return
        parts = [[t for t, owner in zip(tensors, owners) if owner == rank] for rank in range(self.size)]
        counts = [sum(t.numel() for t in part) for part in parts]
        flat = _flat(parts[self.rank], reduce(torch.promote_types, (t.dtype for t in tensors)), tensors[0].device)
        padded = flat.new_zeros(max(counts))
        padded[: len(flat)] = flat
        every = flat.new_empty(self.size * len(padded))
        with self._together(), collective():
            all_gather(every, padded, self.group)
        for rank, (part, values) in enumerate(zip(parts, every.split(len(padded)))):
            if rank != self.rank and part:
                values = values[: counts[rank]].split([t.numel() for t in part])
                torch._foreach_copy_(part, [v.view(t.shape) for v, t in zip(values, part)])

    def alike(self, number: Tensor) -> bool:
        """Whether all ranks have the same, of one element."""
        return self.size == 1 or bool((self.rows(lambda share: number.view(1), self.size) == number).all())

    def leave(self) -> None:
        """All is done: no collective comes any more."""
        if self.size > 1:
            dist.destroy_process_group(self.group)

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except Lost as error:
            raise UserError(f"rank {self.rank} does not reach the others ({brief(error)}); {GO_ON}") from error


ALONE = Ranks()


def join(others: Peers, device: torch.device) -> Ranks:
    """A rank with all others, which call this too, on this device: NCCL between GPUs, Gloo between CPUs. Raises
    UserError.
    """
    rank, size = others.place.rank, others.place.size
    options = {"backend": "gloo"}
    if device.type == "cuda":
        # connected at once, not by the first collective, which may be captured
        options = {"backend": "nccl", "device_id": torch.device("cuda", torch.cuda.current_device())}
    try:
        dist.init_process_group(store=dist.PrefixStore("ddp", others.store), rank=rank, world_size=size, **options)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {rank} could not connect to the others by {options['backend']} ({brief(error)})"
        ) from error
    return Ranks(rank, size, dist.group.WORLD)


def _flat(tensors: list[Tensor], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """All elements in a row, each tensor's in the order of its indices; device: of none."""
    parts = [t.detach().reshape(-1).to(dtype) for t in tensors]
    return torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=device)
