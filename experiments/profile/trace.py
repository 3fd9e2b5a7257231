"""From a chrome trace of training steps to the time of each part: pure functions, so that tests need no device.

A part is a region that the instrumented step opened ("part:NAME"). Work in a backward pass belongs to the part whose
forward operator has the same autograd sequence number. On a GPU, work is kernels, found through the correlation
number of their launches; on a CPU it is the operators themselves, and the native backend's kernels. Idle is the gaps
between pieces of work.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher

from blink.errors import UserError
from blink.kernels.native.library import KERNEL

PART, STEP = "part:", "step"
UNNAMED = "other"
_GPU_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}
_LAUNCHES = {"cuda_runtime", "cuda_driver"}
_COMPILED = "## Call "


@dataclass
class Event:
    """One span of a thread, microseconds, with what it encloses."""

    name: str
    category: str
    start: float
    end: float
    sequence: int | None = None
    correlation: int | None = None
    parent: "Event | None" = None
    children: "list[Event]" = field(default_factory=list)

    def ancestors(self) -> "Iterator[Event]":
        at: Event | None = self
        while at is not None:
            yield at
            at = at.parent


@dataclass(frozen=True)
class Work:
    """One piece of work: a kernel on a GPU, an operator on a CPU; `owner` is (part, pass)."""

    name: str
    start: float
    end: float
    owner: tuple[str, str]


@dataclass(frozen=True)
class Step:
    """One training step: its work in order, and its length from its own begin to the next step's, microseconds."""

    work: list[Work]
    length: float

    @property
    def idle(self) -> float:
        """What no piece of work covers, from the gaps between them."""
        begin = self.work[0].start
        gaps, reached = 0.0, begin
        for piece in sorted(self.work, key=lambda w: w.start):
            gaps += max(0.0, piece.start - reached)
            reached = max(reached, piece.end)
        return gaps + max(0.0, begin + self.length - reached)

    def by_owner(self) -> dict[tuple[str, str], float]:
        out: dict[tuple[str, str], float] = defaultdict(float)
        for piece in self.work:
            out[piece.owner] += piece.end - piece.start
        return dict(out)


def _spans(events: Iterable[dict]) -> Iterator[dict]:
    return (e for e in events if e.get("ph") == "X" and "dur" in e)


def _outermost(events: list[dict]) -> list[Event]:
    """The outermost spans of every host thread, nested by time."""
    by_thread: dict[object, list[dict]] = defaultdict(list)
    for e in _spans(events):
        if e.get("cat") in {"cpu_op", "user_annotation"} | _LAUNCHES:
            by_thread[e["tid"]].append(e)
    roots = []
    for spans in by_thread.values():
        stack = []
        for e in sorted(spans, key=lambda e: (e["ts"], -e["dur"])):
            args = e.get("args", {})
            correlation = args.get("correlation") if e["cat"] in _LAUNCHES else None
            event = Event(e["name"], e["cat"], e["ts"], e["ts"] + e["dur"], args.get("Sequence number"), correlation)
            while stack and stack[-1].end < event.end - 1e-3:
                stack.pop()
            if stack:
                event.parent = stack[-1]
                stack[-1].children.append(event)
            else:
                roots.append(event)
            stack.append(event)
    return roots


def _walk(events: list[Event]) -> Iterator[Event]:
    for event in events:
        yield event
        yield from _walk(event.children)


class Owners:
    """To which (part, pass) a host span belongs."""

    def __init__(self, roots: list[Event]):
        self._forward: dict[int, str] = {}
        for event in sorted(_walk(roots), key=lambda e: e.start):
            if event.sequence is not None and not any(_is_backward(a) for a in event.ancestors()):
                # operators that make no graph node carry the next one's number: the last is the node's own
                self._forward[event.sequence] = _region(event)

    def of(self, event: Event) -> tuple[str, str]:
        direction = "fwd"
        for at in event.ancestors():
            if at.category == "user_annotation" and at.name in ("dgrad", "wgrad"):
                direction = at.name
            if at.name.startswith(PART):
                return at.name.removeprefix(PART), direction
            if _is_backward(at):
                direction = "bwd" if direction == "fwd" else direction
                if at.sequence in self._forward:
                    return self._forward[at.sequence], direction
        return UNNAMED, direction


def _is_backward(event: Event) -> bool:
    return event.name.startswith("autograd::engine::evaluate_function")


def _region(event: Event) -> str:
    return next((a.name.removeprefix(PART) for a in event.ancestors() if a.name.startswith(PART)), UNNAMED)


def _is_operator(event: Event) -> bool:
    return event.category == "cpu_op" and "::" in event.name and not event.name.startswith(("autograd::", "torch::"))


def _host_work(event: Event, owners: Owners) -> Iterator[Work]:
    """The outermost operators inside a span; of a compiled graph, the time that its own kernels take."""
    if event.name.startswith(_COMPILED):
        direction = owners.of(event)[1]
        at = event.start
        for child in event.children:
            yield Work("compiled kernels", at, child.start, ("compiled kernels", direction))
            inner = "convolutions" if "convolution" in child.name else "compiled kernels"
            yield Work(child.name, child.start, child.end, (inner, direction))
            at = child.end
        yield Work("compiled kernels", at, event.end, ("compiled kernels", direction))
    elif event.name.startswith(KERNEL) or _is_operator(event):
        yield Work(event.name, event.start, event.end, owners.of(event))
    else:
        for child in event.children:
            yield from _host_work(child, owners)


def steps_of(trace: dict, on_gpu: bool, eager: list[Work] | None = None) -> list[Step]:
    """Every step but the last that the trace holds (the last has no successor to end it).

    on_gpu: whether the work is a GPU's and not the host's. eager: the work of one step that ran without a CUDA graph:
    in a graph's replay the kernels have no host operator, and each takes the owner of its counterpart in the same
    order. Raises UserError for a trace that lacks the work of a step.
    """
    events = trace["traceEvents"]
    roots = _outermost(events)
    marks = sorted(
        (e for e in _walk(roots) if e.category == "user_annotation" and e.name == STEP), key=lambda e: e.start
    )
    if on_gpu:
        work = _gpu_work(events, roots, marks, eager)
    else:
        owners = Owners(roots)
        work = [sorted(_host_work(mark, owners), key=lambda w: w.start) for mark in marks]
    missing = sum(not pieces for pieces in work)
    if missing or len(work) < 2:
        _refuse(events, missing, len(work), on_gpu)
    begins = [pieces[0].start for pieces in work]
    return [Step(pieces, after - begin) for pieces, begin, after in zip(work, begins, begins[1:])]


def _refuse(events: list[dict], missing: int, steps: int, on_gpu: bool) -> None:
    """Raise UserError that says what a trace lacks: times of anything else must not pass for those of the work."""
    if steps < 2:
        raise UserError(f"the profiler recorded {steps} training steps; expected at least 2: run --profile again")
    if not on_gpu:
        raise UserError(
            f"the profiler recorded no operator in {missing} of {steps} training steps; run --profile again"
        )
    found = sum(e.get("cat") in _GPU_WORK for e in events)
    raise UserError(
        f"the profiler recorded {found} pieces of GPU work, none in {missing} of {steps} training steps; expected some "
        "in each: end other profilers (ncu, nsys) and see that this user may read the GPU's activity (CUPTI), or use "
        "--device cpu"
    )


def _gpu_work(events: list[dict], roots: list[Event], marks: list[Event], eager: list[Work] | None) -> list[list[Work]]:
    """Kernels, copies and fills of each step, by where on the host they were launched."""
    owners = Owners(roots)
    launches = {event.correlation: event for event in _walk(roots) if event.correlation is not None}
    begins = [mark.start for mark in marks]
    work: list[list[tuple[dict, Event]]] = [[] for _ in marks]
    for e in _spans(events):
        launch = launches.get(e.get("args", {}).get("correlation")) if e.get("cat") in _GPU_WORK else None
        step = bisect_right(begins, launch.start) - 1 if launch is not None else -1
        if step >= 0:
            work[step].append((e, launch))
    out = []
    for pieces in work:
        pieces.sort(key=lambda piece: piece[0]["ts"])
        names = [e["name"] for e, _ in pieces]
        if eager is not None:
            found = matched_owners(names, eager)
        else:
            found = [owners.of(launch) for _, launch in pieces]
        out.append([Work(e["name"], e["ts"], e["ts"] + e["dur"], owner) for (e, _), owner in zip(pieces, found)])
    return out


def matched_owners(names: list[str], eager: list[Work]) -> list[tuple[str, str]]:
    """The owner of each kernel of a replay, from the same sequence launched one by one."""
    found = [(UNNAMED, "fwd")] * len(names)
    matcher = SequenceMatcher(None, names, [w.name for w in eager], autojunk=False)
    for block in matcher.get_matching_blocks():
        for i in range(block.size):
            found[block.a + i] = eager[block.b + i].owner
    return found
