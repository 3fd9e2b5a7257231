"""The processes that torchrun starts to train together: which of them this is, and how they hear of each other.

They talk through torchrun's key-value store, or rank 0's where something else started them, and not by collectives: a
rank that dies stops no other, as each notices when another's heart stops beating. torch is imported where it is used.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from blink import ending
from blink.errors import UserError, brief

# seconds: between two beats, without one until a rank counts as dead, between two looks at what others said
BEAT, DEAD_AFTER, LOOK = 2.0, 30.0, 0.25
# until all have found the store; for rank 0 to say what was wrong; for the others to leave before it does
_FOUND_WITHIN, _SAID_WITHIN, _LEFT_WITHIN = 300.0, 60.0, 10.0
GO_ON = "what is finished is kept: go on with --resume where there is an --out folder"
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Unreachable(UserError):
    """The store does not answer, so nothing can be agreed with the others."""


@dataclass(frozen=True)
class Place:
    """This process among `size`: its rank, and `local` of `local_size` on this machine, which is `node` of all.

    restarts: how often torchrun has started all of them anew; launched: False where nothing but this process was.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    local_size: int = 1
    node: int = 0
    restarts: int = 0
    launched: bool = False

    def device(self, name: str | None) -> str | None:
        """--device for this rank: of several GPUs the one of its number on this machine. Raises UserError."""
        import torch

        if self.local_size == 1 or name == "cpu" or not torch.cuda.is_available():
            return name
        if name not in (None, "cuda"):
            raise UserError(f"--device {name} is one device for {self.local_size} processes; expected cpu or cuda")
        found = torch.cuda.device_count()
        if found == 1 and any(variable.endswith("VISIBLE_DEVICES") for variable in os.environ):
            # what started the processes showed each its own
            return "cuda:0"
        if found < self.local_size:
            raise UserError(
                f"{self.local_size} processes on a machine with {found} GPU{'s' * (found > 1)}; start as many as there "
                "are GPUs (--nproc-per-node), or train on the CPU (--device cpu)"
            )
        return f"cuda:{self.local}"

    def divide_threads(self) -> None:
        """The machine's cores are shared by its ranks, unless OMP_NUM_THREADS says otherwise than torchrun's own 1."""
        import torch

        if self.local_size > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // self.local_size))


def place() -> Place:
    """As torchrun's environment says, or another launcher's that sets the same variables. Raises UserError."""
    if any(variable not in os.environ for variable in _VARIABLES):
        return Place()

    def number(variable: str, default: int = 0) -> int:
        text = os.environ.get(variable, str(default))
        if not text.isdecimal():
            raise UserError(f"{variable}={text} in the environment: expected a number, as torchrun sets it")
        return int(text)

    rank, size, local_size = number("RANK"), number("WORLD_SIZE"), number("LOCAL_WORLD_SIZE", 1)
    if rank >= size:
        raise UserError(f"RANK={rank} in the environment: expected less than WORLD_SIZE={size}")
    node = number("GROUP_RANK", rank // max(1, local_size))
    return Place(rank, size, number("LOCAL_RANK"), local_size, node, number("TORCHELASTIC_RESTART_COUNT"), True)


class Alone:
    """A process that has no others: nobody to wait for, nobody to tell."""

    place = Place()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Rank 0 goes first, then one of each machine, then all: what one leaves on disk, the next finds."""
        yield

    def settled(self, content):
        """What rank 0 gives it, ready for JSON, at all ranks, when all have come here."""
        return content

    def check(self) -> None:
        """Raises UserError where another rank has met a mistake."""

    def leave(self) -> None:
        """This rank needs the others no more."""


class Peers(Alone):
    """The others, through the store. Every method raises Unreachable where it does not answer any more."""

    def __init__(self, mine: Place):
        self.place = mine
        self.store = _connected(mine)
        self._seen: dict[int, tuple[int, float]] = {}
        self._left, self._settled = threading.Event(), 0
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while True:
            try:
                self.store.add(f"beat/{self.place.rank}", 1)
            except RuntimeError:
                # the main thread finds that too
                return
            if self._left.wait(BEAT):
                return

    def alive(self, rank: int) -> bool:
        """Whether its heart has beaten lately, as far as this rank can tell since it first asked; one that has not come
        yet has longer.
        """
        beats, now = self.add(f"beat/{rank}", 0), time.monotonic()
        before, since = self._seen.get(rank, (-1, now))
        if beats != before:
            self._seen[rank] = (beats, now)
            return True
        return now - since < (DEAD_AFTER if beats else _FOUND_WITHIN)

    def set(self, key: str, value: object) -> None:
        with self._answering():
            self.store.set(key, json.dumps(value))

    def get(self, key: str):
        """What was set, None where nothing is."""
        with self._answering():
            return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def first(self, key: str, value: object) -> bool:
        """Set what nobody else has, or else return False."""
        text = json.dumps(value)
        with self._answering():
            return self.store.compare_set(key, "", text).decode() == text

    def add(self, key: str, count: int) -> int:
        """To a counter that starts at 0; what it is then."""
        with self._answering():
            return self.store.add(key, count)

    def delete(self, key: str) -> None:
        with self._answering():
            self.store.delete_key(key)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise Unreachable(f"rank {self.place.rank} has lost the others ({brief(error)}); {GO_ON}") from error

    def wait(self, arrived: Callable[[], bool]) -> None:
        """Raises UserError for another's mistake, or if rank 0 dies."""
        while not arrived():
            self.check()
            if not self.alive(0):
                raise UserError(f"rank 0 is gone; {GO_ON}")
            time.sleep(LOOK)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        mine, here = self.place, f"first/{self.place.node}"
        if mine.rank:
            self.wait(lambda: self.get("first") is not None)
        if mine.local:
            self.wait(lambda: self.get(here) is not None)
        try:
            yield
        finally:
            if mine.rank == 0:
                self.set("first", True)
            if mine.local == 0:
                self.set(here, True)

    def settled(self, content):
        self._settled += 1
        mine, here, settled = self.place, f"here/{self._settled}", f"settled/{self._settled}"
        began, missing = time.monotonic(), set(range(1, mine.size))
        if mine.rank:
            self.set(f"{here}/{mine.rank}", True)
            self.wait(lambda: self.get(settled) is not None)
            return self.get(settled)["content"]
        while missing := {rank for rank in missing if self.get(f"{here}/{rank}") is None}:
            self.check()
            for rank in missing:
                if not self.alive(rank):
                    raise UserError(f"rank {rank} of {mine.size} did not come in {time.monotonic() - began:.0f} s")
            time.sleep(LOOK / 5)
        self.set(settled, {"content": content})
        return content

    def check(self) -> None:
        found = self.get("mistake")
        if found is not None and found["rank"] != self.place.rank:
            raise UserError(f"rank {found['rank']}: {found['what']}")

    def complain(self, error: UserError) -> None:
        """Print what was wrong, once for all ranks: rank 0 does, while it lives."""
        rank, until = self.place.rank, time.monotonic() + _SAID_WITHIN
        said = rank == 0
        try:
            self.first("mistake", {"rank": rank, "what": str(error)})
            while not said and self.alive(0) and time.monotonic() < until:
                time.sleep(LOOK / 5)
                said = self.get("said") is not None
            if rank == 0:
                _print(str(error))
                self.set("said", 0)
            elif not said and self.first("said", rank):
                _print(f"rank {rank}: {error}")
        except Unreachable:
            if not said:
                _print(f"rank {rank}: {error}")
        self.leave()

    def leave(self) -> None:
        until, here = time.monotonic() + _LEFT_WITHIN, set(range(1, self.place.size))
        try:
            self.set(f"left/{self.place.rank}", True)
            # the store may be rank 0's own
            while self.place.rank == 0 and here and time.monotonic() < until:
                here = {rank for rank in here if self.get(f"left/{rank}") is None and self.alive(rank)}
                time.sleep(LOOK / 5)
        except Unreachable:
            # who is gone has left
            pass
        self._left.set()


ALONE = Alone()


@cache
def peers() -> Alone:
    """Of this process; connects at the first call."""
    mine = place()
    return Peers(mine) if mine.size > 1 else ALONE


def complain(error: UserError) -> None:
    """Print a mistake as one line on stderr; of several ranks one does."""
    try:
        others = ALONE if isinstance(error, Unreachable) else peers()
    except UserError:
        others = ALONE
    if isinstance(others, Peers):
        others.complain(error)
    else:
        _print(str(error))


def _print(text: str) -> None:
    ending.complain(f"blink: {text}")


def _connected(mine: Place):
    from datetime import timedelta

    import torch.distributed as dist

    try:
        store, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=_FOUND_WITHIN)))
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise Unreachable(f"rank {mine.rank} of {mine.size} found no store at {where} ({brief(error)})") from error
    # of torchrun's own keys none is ours; each time that it starts all anew is another training
    return dist.PrefixStore(f"blink/{mine.restarts}", store)
