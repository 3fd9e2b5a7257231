"""The compiled CPU kernels: every op against float64 where the fused one is, on any number of threads; what they leave
to the reference; and how they are made, tried and kept."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blink.kernels import native, reference
from blink.kernels.environment import has_cxx_compiler
from blink.kernels.examine.cases import excite_norm_act_add, pool_norm_act, small_cases
from blink.kernels.native import batch_norm, library, optimizers, stem, trial
from tests import (
    test_excite_norm_act_add,
    test_muon,
    test_newton_schulz,
    test_norm_act,
    test_pool_norm_act,
    test_sgd_nesterov,
    test_whiten,
    test_whiten_project_norm_act,
)
from tests.oracle import Tolerance, copies, judge, judge_lists, judge_on, name_of, run

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
IMAGES = (*(test_pool_norm_act, test_excite_norm_act_add, test_norm_act, test_whiten, test_whiten_project_norm_act),)
SMALL = [case for case in small_cases() if hasattr(batch_norm, case.op) or hasattr(stem, case.op)]
JUDGED = [(module, case) for module in IMAGES for case in module.CASES if case.differentiable]
of_small = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.op)

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a case's tensors are on the GPU there"),
    pytest.mark.skipif(not has_cxx_compiler(), reason="there is no C++ compiler here"),
]


@pytest.fixture
def no_reference(monkeypatch):
    """The compiled ops hand nothing on."""
    for module in (batch_norm, stem, optimizers):
        nothing = SimpleNamespace(ACTIVATIONS=reference.ACTIVATIONS, _shape_factor=reference._shape_factor)
        monkeypatch.setattr(module, "reference", nothing)


def tolerance(module, dtype: torch.dtype) -> Tolerance:
    return module.TOLERANCES[dtype]


@pytest.mark.usefixtures("poisoned_memory", "no_reference")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("module, case", JUDGED, ids=lambda value: getattr(value, "label", ""))
def test_matches_float64(module, case, dtype):
    judge(case, dtype, tolerance(module, dtype), ops=native)


@pytest.mark.usefixtures("poisoned_memory", "no_reference")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@of_small
def test_small_cases_match_float64(case, dtype):
    """With a scale, without statistics, and the stems from a data set, moved, mirrored, cut and jittered."""
    module = sys.modules[f"tests.test_{case.op}"]
    judge(case, dtype, tolerance(module, dtype), ops=native)


@pytest.mark.usefixtures("no_reference")
def test_whitening_without_a_bias_is_that_with_zeros():
    (case,) = (case for case in test_whiten.CASES if not case.differentiable)
    tensors = case.make(CPU, torch.float32)
    ours = case.call(native, tensors, torch.float32)
    zeros = torch.zeros(len(tensors["weight"]), requires_grad=True)
    assert not ours.requires_grad and torch.equal(ours, case.call(native, {**tensors, "bias": zeros}, torch.float32))


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(2, 5), channels=st.integers(1, 40), height=st.integers(2, 9), width=st.integers(2, 9),
    training=st.booleans(), first=st.booleans(), second=st.booleans(), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_shape(batch, channels, height, width, training, first, second, dtype):
    sizes = (batch, channels, height, width)
    pooled = pool_norm_act(*sizes, training=training, eps=1e-3, squeeze=first, fork=second)
    judge(pooled, dtype, tolerance(test_pool_norm_act, dtype).loosened(10), versus_pytorch=False, ops=native)
    added = excite_norm_act_add(*sizes, first, second, training=training, eps=1e-3)
    judge(added, dtype, tolerance(test_excite_norm_act_add, dtype).loosened(10), versus_pytorch=False, ops=native)


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize("name", ["gelu", "silu", "relu", "hardswish", None])
def test_activations_of_every_size_and_of_no_number(name):
    """Values and gradients, infinities and NaN where PyTorch has them: of numbers normalized to themselves."""
    ordinary = torch.linspace(-30, 30, 4001)
    hazards = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1e30, -1e30, 1e-30, 3.0, -3.0, 13.3])
    values = torch.cat([ordinary, hazards])
    results = []
    for ops, dtype in ((native, torch.float32), (reference, torch.float64)):
        x = values.to(dtype).view(1, 1, 1, -1).contiguous(memory_format=torch.channels_last).requires_grad_()
        statistics = (torch.zeros(1, dtype=dtype), torch.full((1,), 1 - 1e-5, dtype=dtype))
        y = ops.norm_act(x, torch.zeros(1, dtype=dtype), *statistics, training=False, eps=1e-5, activation=name)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        dx = dx.double().flatten()
        if name == "hardswish":
            # PyTorch's own is 1 or NaN by whether the number stands in a whole vector of its processor's
            dx[values.isnan()] = 1
        results.append((y.detach().double().flatten(), dx))
    for ours, truth in zip(*results):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6, equal_nan=True)


@of_small
def test_the_same_bits_on_any_number_of_threads(case):
    threads = torch.get_num_threads()
    tensors = case.make(CPU, torch.bfloat16)
    with torch.no_grad():
        upstream = torch.randn_like(case.combined(native, copies(tensors), torch.bfloat16))
    results = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(run(case, native, tensors, torch.bfloat16, upstream))
    finally:
        torch.set_num_threads(threads)
    for name, value in results[0].items():
        assert all(torch.equal(value, other[name]) for other in results[1:]), name


def test_ties_and_nan_in_a_pooling_window_are_pytorchs():
    x = torch.randint(-1, 2, (3, 20, 7, 6)).to(torch.bfloat16)
    x[1, 3, 2, 2] = float("nan")
    x = x.contiguous(memory_format=torch.channels_last)
    case = pool_norm_act(3, 20, 7, 6, eps=1e-3, activation=None, squeeze=False)
    given = case.make(CPU, torch.float32)
    chosen = []
    for ops in (native, reference):
        leaf = x.clone().requires_grad_()
        own = {**{k: v.clone() for k, v in given.items()}, "x": leaf}
        statistics = {"running_mean": torch.zeros(20), "running_var": torch.ones(20)}
        y = ops.pool_norm_act(**{**own, **statistics}, **{**case.options, "training": False})[0]
        (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        assert y[1, 3, 1, 1].isnan()
        chosen.append(dx != 0)
    assert torch.equal(*chosen)


def test_mean_far_from_zero():
    case = excite_norm_act_add(4, 6, 8, 8, gate=False, residual=False, activation=None)
    tensors = case.make(CPU, torch.float32)
    tensors["x"] = (tensors["x"] + 1000).contiguous(memory_format=torch.channels_last)
    judge_on(case, tensors, torch.float32, Tolerance(2e-4, 3e-4), versus_pytorch=False, ops=native)


@of_small
def test_only_what_requires_a_gradient_gets_one(case):
    for name in case.differentiable:
        tensors = case.make(CPU, torch.float32)
        tensors[name].requires_grad_()
        case.combined(native, tensors, torch.float32).sum().backward()
        assert tensors[name].grad.isfinite().all()
        assert all(v.grad is None for k, v in tensors.items() if v is not None and k != name)


@of_small
def test_second_derivative_is_a_clear_error(case):
    tensors = case.make(CPU, torch.float32)
    name = case.differentiable[0]
    tensors[name].requires_grad_()
    y = case.combined(native, tensors, torch.float32)
    (grad,) = torch.autograd.grad(y.square().sum(), tensors[name], create_graph=True)
    with pytest.raises(RuntimeError, match=rf"^{case.op} is differentiable once.*use reference\.{case.op}$"):
        grad.square().sum().backward()


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_some_outputs_of_a_pooling_may_go_unused(used):
    case = pool_norm_act(2, 6, 5, 5, eps=1e-3, fork=True)
    tensors = case.make(CPU, torch.float32)
    grads = []
    for ops, dtype in ((native, torch.float32), (reference, torch.float64)):
        own = {k: v.detach().clone().to(dtype) for k, v in tensors.items()}
        own["x"].requires_grad_()
        outputs = case.call(ops, own, dtype)
        loss = sum(
            (outputs[i].flatten() * torch.linspace(-1, 1 + i, outputs[i].numel(), dtype=dtype)).sum() for i in used
        )
        grads.append(torch.autograd.grad(loss, own["x"])[0].double())
    assert (grads[0] - grads[1]).abs().max() <= 1e-5 * grads[1].abs().max()


@of_small
def test_what_the_kernels_do_not_take_is_the_references(case):
    """float64, float16, contiguous memory, a compiled call: the very numbers of the reference."""
    first = next(iter(case.arguments))
    tensors = case.make(CPU, torch.float32)
    others = [{k: v.double() if v is not None and v.is_floating_point() else v for k, v in tensors.items()}]
    if tensors[first].is_floating_point():
        others.append({**tensors, first: tensors[first].contiguous()})
    for other in others:
        dtype = torch.float64 if other is others[0] else torch.float32
        results = [case.combined(ops, copies_of(other), dtype) for ops in (native, reference)]
        assert torch.equal(*results)
    results = [case.combined(ops, case_in_half(case), torch.float16) for ops in (native, reference)]
    assert torch.equal(*results)


def copies_of(tensors: dict) -> dict:
    return {k: None if v is None else v.clone(memory_format=torch.preserve_format) for k, v in tensors.items()}


def case_in_half(case) -> dict:
    torch.manual_seed(0)
    return case.make(CPU, torch.float16)


def test_wrong_shapes_never_reach_the_kernels():
    case = excite_norm_act_add(2, 4, 3, 3)
    good = {**case.make(CPU, torch.float32), **case.options}
    for changed in (
        {"bias": torch.zeros(5)}, {"gate": torch.ones(2, 5)}, {"running_mean": torch.zeros(3)},
        {"residual": good["residual"][:, :3]},
    ):  # fmt: skip
        with pytest.raises((RuntimeError, ValueError)):
            native.excite_norm_act_add(**{**good, **changed})
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    pixels = dict(mean=torch.zeros(3), std=torch.ones(3))
    from blink.kernels.gather import Gather

    for index in ([0, 3], [-4, 0]):
        with pytest.raises(IndexError):
            native.whiten(images, torch.randn(4, 3, 2, 2), **pixels, gather=Gather(torch.tensor(index)))


@pytest.mark.usefixtures("poisoned_memory", "no_reference")
@pytest.mark.parametrize("case", test_sgd_nesterov.CASES, ids=lambda c: c.label)
def test_sgd_matches_float64(case):
    judge_lists(
        case, case.make(CPU, torch.float32), torch.float32, test_sgd_nesterov.TOLERANCES[torch.float32], 2, native
    )


@pytest.mark.usefixtures("poisoned_memory", "no_reference")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", test_muon.CASES, ids=lambda c: c.label)
def test_muon_matches_float64(case, dtype):
    """float32 weights, the iteration in `dtype`."""
    judge_lists(case, case.make(CPU, torch.float32), dtype, test_muon.TOLERANCES[dtype], 2, native)


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("variant", test_muon.VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_variants_of_muon_match_float64(variant, dtype):
    case = test_muon.varied(test_muon.muon([(12, 5, 3, 3), (70, 7), (30, 2, 3, 1)]), variant)
    judge_lists(case, case.make(CPU, torch.float32), dtype, 3.2 * test_muon.TOLERANCES[dtype], 2, native)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_newton_schulz_matches_float64(dtype):
    case = test_newton_schulz.newton_schulz([(1, 7), (5, 5), (70, 80), (130, 3)])
    tolerances = test_newton_schulz.TOLERANCES[dtype], test_newton_schulz.TIMES_PYTORCH[dtype]
    judge_lists(case, case.make(CPU, torch.float32), dtype, *tolerances, native)


def test_a_gradient_in_another_layout_is_taken_and_none_leaves_the_parameter_alone():
    for ops in ("sgd_nesterov", "muon"):
        results = []
        for layout in (torch.channels_last, torch.contiguous_format):
            torch.manual_seed(1)
            params = [torch.randn(6, 4, 3, 3).contiguous(memory_format=torch.channels_last) for _ in range(2)]
            grads, untouched = [torch.randn(6, 4, 3, 3).contiguous(memory_format=layout), None], params[1].clone()
            buffers = [torch.zeros_like(p) for p in params]
            options = {"dtype": torch.float32} if ops == "muon" else {}
            getattr(native, ops)(params, grads, buffers, torch.tensor(0.1), momentum=0.9, **options)
            assert torch.equal(params[1], untouched) and not buffers[1].any()
            results.append(params[0])
        assert torch.equal(*results)


SCRIPT = """
import sys, warnings, torch
from blink.kernels import native, reference
warnings.simplefilter("always")
x = torch.linspace(-2, 2, 64).view(1, 4, 4, 4).contiguous(memory_format=torch.channels_last)
with warnings.catch_warnings(record=True) as said:
    results = [native.pool_norm_act(x, torch.zeros(4))[0] for _ in range(2)]
    native.norm_act(x, torch.zeros(4))
assert torch.equal(results[0], reference.pool_norm_act(x, torch.zeros(4))[0]) or not said
print(len(said), *(str(w.message) for w in said))
"""


def start(folder: Path, **environment: str) -> subprocess.Popen:
    env = {**os.environ, "BLINK_CACHE": str(folder), "OMP_NUM_THREADS": "1", **environment}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=ROOT, env=env, **pipes)


def printed(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip()


@pytest.mark.parametrize("compiler", ["/nowhere/g++", "false"])
def test_without_a_working_compiler_the_reference_runs_and_one_line_says_so(compiler, tmp_path):
    said = printed(start(tmp_path, CXX=compiler))
    assert said.startswith("1 no compiled kernels, plain PyTorch runs in their place: ") and "\n" not in said
    assert not list(tmp_path.rglob("*.so"))


def test_a_library_is_compiled_once_by_processes_that_start_together_and_then_read(tmp_path):
    processes = [start(tmp_path) for _ in range(2)]
    assert [printed(process) for process in processes] == ["0", "0"]
    (made,) = (tmp_path / "native").glob("*.so")
    stamp = made.stat().st_mtime_ns
    assert printed(start(tmp_path)) == "0" and made.stat().st_mtime_ns == stamp
    assert not list((tmp_path / "native").glob("*.tmp"))


def test_where_nothing_can_be_kept_a_process_compiles_for_itself(tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert printed(start(file)) == "0"


def test_a_wrong_or_a_slow_kernel_fails_its_trial(monkeypatch):
    said = []
    monkeypatch.setattr(trial, "say_once", said.append)

    def wrong(*lists, **options):
        reference.sgd_nesterov(*lists, **options)
        lists[0][0].mul_(1.1)

    def slow(*lists, **options):
        reference.sgd_nesterov(*lists, **options)
        torch.randn(1 << 20)

    assert not trial._passes("sgd_nesterov", SimpleNamespace(sgd_nesterov=slow)) and not said
    assert not trial._passes("sgd_nesterov", SimpleNamespace(sgd_nesterov=wrong))
    assert "sgd_nesterov is wrong on this machine" in said[0]


def test_trials_are_kept_and_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("BLINK_CACHE", str(tmp_path))
    monkeypatch.setattr(library, "compile_all", lambda activation: True)
    asked = []
    monkeypatch.setattr(trial, "_passes", lambda name, ops: asked.append(name) or name == "muon")
    state = torch.get_rng_state()
    for _ in range(2):
        ops = trial.passed(["muon", "whiten", "cross_entropy"])
        assert ops.muon is native.muon
        assert ops.whiten is reference.whiten and ops.cross_entropy is reference.cross_entropy
    assert len(asked) == len(trial._TRIALS) and torch.equal(state, torch.get_rng_state())
    (kept,) = (tmp_path / "native").glob("trial-*.json")
    assert json.loads(kept.read_text())["muon"] is True
    kept.write_text("{")
    trial.passed(["muon"])
    assert len(asked) == 2 * len(trial._TRIALS)
