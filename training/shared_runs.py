"""The runs of one training shared out over ranks: whoever is free takes the next seed, and rank 0 collects.

A ticket is the right to one run, in the order of a counter in the store. A rank that has a ticket and finds no run for
it yet waits: should a rank die, rank 0 issues its seed anew, and that is the next ticket's. Nothing here is collective.
"""

import time
from collections.abc import Callable, Iterator, Sequence

from blink.training import peers
from blink.training.listener import Listener
from blink.training.report import Report
from blink.training.results import EpochRow, RunResult, run_as_dict, run_from_dict


class SharedRuns(Listener):
    """One rank's part of them; a listener of its own runs.

    report: rank 0's gets the others' results; save: called there after some came.
    """

    def __init__(self, others: peers.Peers, report: Report, save: Callable[[], None]):
        self._peers, self._rank, self._report, self._save = others, others.place.rank, report, save
        self._seeds: list[int] = []
        self._ticket = -1
        self._result: RunResult | None = None
        self._notes: list[str] = []
        # rank 0's: tickets whose runs have not ended, when one was first seen that nobody had signed, others' results
        self._open: set[int] = set()
        self._unowned: dict[int, float] = {}
        self._came: list[RunResult] = []

    def on_resume(self, rows: list[EpochRow], losses: list[float]) -> None:
        """What an earlier process did."""

    def on_epoch(self, row: EpochRow) -> None:
        self.look()

    def on_end(self, result: RunResult | None) -> None:
        self._result = result

    def note(self, line: str) -> None:
        """What a person should know of the run that is going on: told by rank 0."""
        if self._rank == 0:
            self._report.note(line)
        else:
            self._notes.append(line)

    def taken_from(self, seeds: Sequence[int], on_earlier: Callable[[RunResult], None]) -> Iterator[int]:
        """Of all seeds that are to be trained, those that this rank is to train, until all ranks' runs have ended.

        A run counts as finished, and is told to rank 0, when the next seed is asked for. on_earlier: called there with
        each result of another, between its own runs.
        """
        self._seeds, self._open = list(seeds), set(range(len(seeds)))
        while True:
            while self._came:
                on_earlier(self._came.pop(0))
            self._ticket = self._peers.add("tickets", 1) - 1
            self._peers.set(f"owner/{self._ticket}", self._rank)
            if self._rank == 0:
                self.look()
                while self._ticket >= len(self._seeds) and self._open:
                    time.sleep(peers.LOOK)
                    self.look()
                if not self._open:
                    self._peers.set("over", True)
                    for result in self._came:
                        on_earlier(result)
                    return
                yield self._seeds[self._ticket]
                self._open.discard(self._ticket)
            else:
                self._peers.wait(lambda: self._ticket < self._issued() or self._peers.get("over") is not None)
                if self._ticket >= self._issued():
                    return
                again = self._peers.get(f"again/{self._ticket}")
                yield self._seeds[self._ticket] if again is None else again
                run = run_as_dict(self._result, self._report.every)
                content = {"run": run, "steps": len(self._result.losses), "rank": self._rank, "notes": self._notes}
                self._peers.set(f"result/{self._ticket}", content)
                self._notes = []

    def _issued(self) -> int:
        """How many tickets are good for a run."""
        return len(self._seeds) + self._peers.add("again", 0)

    def look(self) -> None:
        """See what became of the others' runs. Raises UserError for another's mistake."""
        self._peers.check()
        if self._rank:
            return
        taken = self._peers.add("tickets", 0)
        running = [ticket for ticket in sorted(self._open) if ticket < taken and ticket != self._ticket]
        came = {ticket for ticket in running if self._collect(ticket)}
        if came:
            self._save()
        orphans: dict[int | None, list[int]] = {}
        for ticket in running:
            owner = self._peers.get(f"owner/{ticket}")
            if ticket not in came and self._gone(ticket, owner):
                orphans.setdefault(owner, []).append(self._issue_again(ticket))
        for owner, seeds in orphans.items():
            who = "a rank" if owner is None else f"rank {owner}"
            self._report.note(f"{who} is gone; what it had not finished is trained again: {named_seeds(seeds)}")

    def _collect(self, ticket: int) -> bool:
        """Whether its run has ended; then it is in the report."""
        content = self._peers.get(f"result/{ticket}")
        if content is None:
            return False
        self._peers.delete(f"result/{ticket}")
        self._open.discard(ticket)
        for line in content["notes"]:
            self._report.note(f"rank {content['rank']}: {line}")
        self._came.append(run_from_dict(content["run"], content["steps"]))
        self._report.add(self._came[-1], f"rank {content['rank']}")
        return True

    def _gone(self, ticket: int, owner: int | None) -> bool:
        """Whether who took it is dead, or died before it said who it is."""
        if owner is not None:
            return not self._peers.alive(owner)
        now = time.monotonic()
        return now - self._unowned.setdefault(ticket, now) > peers.DEAD_AFTER

    def _issue_again(self, ticket: int) -> int:
        """The seed, which now has another ticket."""
        seed, another = self._seeds[ticket], len(self._seeds)
        self._open ^= {ticket, another}
        self._seeds.append(seed)
        self._peers.set(f"again/{another}", seed)
        self._peers.add("again", 1)
        return seed


def named_seeds(seeds: Sequence[int]) -> str:
    """Some of them, in words."""
    shown = ", ".join(map(str, seeds[:10])) + (f" and {len(seeds) - 10} more" if len(seeds) > 10 else "")
    return f"seed{'s' * (len(seeds) > 1)} {shown}"
