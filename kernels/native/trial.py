"""Which compiled ops are right and no slower than plain PyTorch on this machine: tried once, kept, read at every start.

A trial is the op and its backward pass on a small batch of the network's widths, in float32 and bfloat16, alternating
with the reference. All trials take a second, and the compiler a few more the first time.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from blink.errors import is_exhausted
from blink.files import from_json, replacing

from .. import reference
from ..dispatch import say_once
from ..environment import cpu_flags
from . import library

_ROUNDS = 15
# of the largest value; a wrong kernel is off by far more, and the tests judge the rest
_CLOSE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}

# of the module that has the op, its results
Call = Callable[[ModuleType], list[Tensor]]


def _images(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def _differentiated(call: Callable[[ModuleType], Tensor], *leaves: Tensor) -> Call:
    with torch.no_grad():
        y = call(reference)
    upstream = torch.randn_like(y)

    def run(ops: ModuleType) -> list[Tensor]:
        y = call(ops)
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]

    return run


def _stem(dtype: torch.dtype) -> tuple[tuple, dict]:
    images = torch.randint(256, (32, 3, 32, 32), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    mean, std = torch.full((3,), 0.47), torch.full((3,), 0.25)
    return (images, torch.randn(12, 3, 2, 2)), dict(mean=mean, std=std, activation="gelu", dtype=dtype)


def _whiten(dtype: torch.dtype) -> Call:
    (images, _), options = _stem(dtype)
    weight, bias = torch.randn(24, 3, 2, 2), torch.zeros(24, requires_grad=True)
    return _differentiated(lambda ops: ops.whiten(images, weight, bias, **options), bias)


def _whiten_project_norm_act(dtype: torch.dtype) -> Call:
    arguments, options = _stem(dtype)
    project, bias = torch.randn(32, 12, requires_grad=True), torch.zeros(32, requires_grad=True)
    return _differentiated(lambda ops: ops.whiten_project_norm_act(*arguments, project, bias, **options), project, bias)


def _excite_norm_act_add(dtype: torch.dtype) -> Call:
    x, bias = _images(dtype, 64, 64, 15, 15).requires_grad_(), torch.zeros(64, requires_grad=True)
    return _differentiated(lambda ops: ops.excite_norm_act_add(x, None, bias), x, bias)


def _pool_norm_act(dtype: torch.dtype) -> Call:
    x, bias = _images(dtype, 64, 64, 23, 23).requires_grad_(), torch.zeros(64, requires_grad=True)
    return _differentiated(lambda ops: ops.pool_norm_act(x, bias, squeeze=False)[0], x, bias)


def _updated(step: Callable[[ModuleType, list, list, list, Tensor], None]) -> Call:
    shapes = [(64, 24, 3, 3), (128, 64, 3, 3), (64,)]
    params, grads = ([torch.randn(shape) for shape in shapes] for _ in range(2))

    def run(ops: ModuleType) -> list[Tensor]:
        own = [p.clone() for p in params]
        step(ops, own, grads, [torch.zeros_like(p) for p in own], torch.tensor(0.1))
        return own

    return run


def _sgd_nesterov(dtype: torch.dtype) -> Call:
    return _updated(lambda ops, *lists: ops.sgd_nesterov(*lists, momentum=0.9))


def _muon(dtype: torch.dtype) -> Call:
    def step(ops: ModuleType, params: list, grads: list, buffers: list, lr: Tensor) -> None:
        ops.muon(params[:2], grads[:2], buffers[:2], lr, momentum=0.6, dtype=dtype)

    return _updated(step)


_TRIALS: dict[str, Callable[[torch.dtype], Call]] = {
    "whiten": _whiten,
    "whiten_project_norm_act": _whiten_project_norm_act,
    "excite_norm_act_add": _excite_norm_act_add,
    "pool_norm_act": _pool_norm_act,
    "sgd_nesterov": _sgd_nesterov,
    "muon": _muon,
}


def _seconds(run: Call, ops: ModuleType) -> float:
    begin = time.perf_counter()
    run(ops)
    return time.perf_counter() - begin


def _passes(name: str, native: ModuleType) -> bool:
    """Whether the op gives the reference's results, or else says so, in no more time, in float32 and in bfloat16."""
    for dtype in _CLOSE:
        torch.manual_seed(0)
        run = _TRIALS[name](dtype)
        for ours, theirs in zip(run(native), run(reference)):
            # written so that a NaN fails
            if not (ours.float() - theirs.float()).abs().max() <= _CLOSE[dtype] * theirs.float().abs().max():
                say_once(f"the native {name} is wrong on this machine ({dtype}); plain PyTorch runs in its place")
                return False
        rounds = [(_seconds(run, native), _seconds(run, reference)) for _ in range(_ROUNDS)]
        if min(own for own, _ in rounds) > min(plain for _, plain in rounds):
            return False
    return True


def passed(names: Iterable[str]) -> SimpleNamespace:
    """The ops of these names: compiled where the op passed its trial on this machine, else the reference's."""
    from blink.kernels import native

    results = _results(native)
    return SimpleNamespace(**{n: getattr(native if results.get(n) else reference, n) for n in names})


def _results(native: ModuleType) -> dict[str, bool]:
    facts = [torch.__version__, *sorted(cpu_flags()), torch.get_num_threads(), library.digest_of_sources()]
    name = hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
    path = library.folder() / f"trial-{name}.json"
    with suppress(OSError, ValueError):
        kept = from_json(path.read_bytes())
        if isinstance(kept, dict) and set(kept) == set(_TRIALS):
            return kept
    if not library.compile_all("gelu"):
        return {}
    # what is drawn here is nobody's but the trials'
    try:
        with torch.random.fork_rng(devices=[]):
            results = {name: _passes(name, native) for name in _TRIALS}
    except RuntimeError as error:
        if not is_exhausted(error):
            raise
        # nothing is known, and nothing kept; what does not fit the training will say
        return {}
    # what cannot be kept is tried again by the next start
    with suppress(OSError), replacing(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")
    return results
