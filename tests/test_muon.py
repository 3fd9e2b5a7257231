"""muon: fused against the float64 reference."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from blink import kernels
from blink.kernels import fused
from blink.kernels.examine.cases import mapped, muon, recipe_cases
from blink.kernels.examine.compile_report import allowed_spills
from blink.kernels.launching import captured_launches
from tests.oracle import DEVICE, DTYPES, in_float64, judge_lists, name_of
from tests.test_newton_schulz import TOLERANCES as ITERATION

# the iteration's, weighted by the rate of 0.3 against weights of about the same size; and one rounding of each result
TOLERANCES = {dtype: 0.5 * ITERATION[dtype] + 0.51 * torch.finfo(dtype).eps for dtype in ITERATION}

CASES = [
    # channels_last, padded both ways; a matrix; taller than wide; of one element
    muon([(12, 5, 3, 3), (40, 7), (30, 2, 3, 1), (1, 1)]),
    muon([(70, 3, 3, 3), (7, 24, 1, 1)], weight_decay=0.2, renormalize=False, buffer_dtype=torch.float32, rates=True),
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_matches_float64(case, dtype):
    # momentum is exact in float64 but for one rounding, which the reference makes too: twice its error
    judge_lists(case, case.make(DEVICE, dtype), dtype, TOLERANCES[dtype], times_pytorch=2)


def varied(case, variant: dict):
    return replace(case, options={**case.options, **variant})


VARIANTS = [
    {"nesterov": False},
    {"averaged": True, "shape_factor": "original", "weight_decay": 0.2},
    {"averaged": True, "nesterov": False, "shape_factor": "match_rms_adamw", "renormalize": False},
    {"shape_factor": "spectral_unclamped"},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_published_variants_match_float64(variant, dtype):
    case = varied(muon([(12, 5, 3, 3), (70, 7), (30, 2, 3, 1)]), variant)
    # a factor enlarges the update, by up to 3 here, and its error
    judge_lists(case, case.make(DEVICE, dtype), dtype, 3.2 * TOLERANCES[dtype], times_pytorch=2)


COMPILING = """
import torch
from blink.kernels.examine.ahead_of_time import capture, compile_launch
from tests.test_muon import *
(case,) = (case for case in recipe_cases("air") if case.op == "muon")
for variant in VARIANTS:
    launches = capture(varied(case, variant), torch.float16)
    for launch in (launches[0], launches[-1]):
        made = compile_launch(launch, "sm_90")
        print(made.kernel, made.spills)
"""


def test_no_variant_spills_registers():
    """Compiled for a GPU, in a process where kernels can be: what the options change, the first launch and the last."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", COMPILING], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _ in rows] == ["_gather_kernel", "_finish_kernel"] * len(VARIANTS)
    assert max(int(spills) for _, spills in rows) <= allowed_spills("sm_90", triton.__version__)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_matches_float64_at_the_networks_shapes(dtype):
    (case,) = (case for case in recipe_cases("blink") if case.op == "muon")
    judge_lists(case, case.make(DEVICE, dtype), dtype, TOLERANCES[dtype], times_pytorch=2)


@settings(max_examples=6, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple), min_size=1, max_size=3),
    weight_decay=st.sampled_from([0.0, 0.3]),
    renormalize=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shapes(shapes, weight_decay, renormalize, dtype):
    case = muon(shapes, weight_decay=weight_decay, renormalize=renormalize)
    judge_lists(case, case.make(DEVICE, dtype), dtype, TOLERANCES[dtype] * 10, times_pytorch=None)


def small(*shapes, dtype=torch.float32) -> dict:
    return {**muon(list(shapes)).make(DEVICE, dtype), "momentum": 0.6}


def changed(tensors: dict, **replaced) -> dict:
    return {k: replaced.get(k, mapped(torch.clone, v) if k != "momentum" else v) for k, v in tensors.items()}


def test_is_airbenchs_step():
    """Its formula in its own order, in float64, for two steps from a zero momentum."""
    own = small((8, 3, 3, 3), (5, 11))
    own["momentum_buffers"] = [torch.zeros_like(p) for p in own["params"]]
    weights = [p.double() for p in own["params"]]
    buffers = [torch.zeros_like(p) for p in weights]
    for _ in range(2):
        own["grads"] = [torch.randn_like(p) for p in own["params"]]
        fused.muon(**own, dtype=torch.float32)
        for p, grad, buffer in zip(weights, own["grads"], buffers):
            buffer.mul_(0.6).add_(grad.double())
            g = grad.double() + 0.6 * buffer
            p.mul_(len(p) ** 0.5 / p.norm())
            x = g.reshape(len(g), -1)
            x = x / (x.norm() + 1e-7)
            for _ in range(3):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            p.add_(x.view(p.shape), alpha=-0.3)
    for p, want in zip(own["params"], weights):
        torch.testing.assert_close(p.double(), want, rtol=0, atol=1e-5)


def test_memory_order_does_not_matter():
    """Contiguous and channels_last filters, and a gradient in the other layout, give the same step."""
    tensors = small((8, 5, 3, 3))
    formats = (torch.contiguous_format, torch.channels_last)
    results = []
    for layout in formats:
        own = changed(tensors)
        for name in ("params", "momentum_buffers"):
            own[name] = [t.contiguous(memory_format=layout) for t in own[name]]
        fused.muon(**own, dtype=torch.float32)
        assert own["params"][0].is_contiguous(memory_format=layout)
        results.append(own)
    for name in ("params", "momentum_buffers"):
        torch.testing.assert_close(results[0][name][0], results[1][name][0], rtol=0, atol=2e-6)


def test_mixed_dtypes():
    """float16 weights with float32 momentum and gradients of either, in one call."""
    tensors = small((8, 12), (6, 4, 3, 3), dtype=torch.float16)
    tensors["momentum_buffers"] = [b.float() for b in tensors["momentum_buffers"]]
    tensors["grads"][0] = tensors["grads"][0].float()
    exact = in_float64({k: v for k, v in tensors.items() if k != "momentum"})
    kernels.reference.muon(**exact, momentum=0.6, dtype=torch.float64)
    fused.muon(**tensors)
    for name, tolerance in (("params", TOLERANCES[torch.float16]), ("momentum_buffers", 1e-6)):
        for value, want in zip(tensors[name], exact[name]):
            assert (value.double() - want).abs().max() <= tolerance * want.abs().max()


def test_renormalized_weights_keep_the_norm():
    """Without a gradient a weight only gets the norm sqrt(O); decay then shrinks it; zeros stay zeros."""
    tensors = small((8, 12), (6, 10), (3, 4))
    for name in ("grads", "momentum_buffers"):
        tensors[name] = [torch.zeros_like(t) for t in tensors[name]]
    tensors["params"][2].zero_()
    fused.muon(**tensors, weight_decay=0.5)
    norms = [p.norm().item() for p in tensors["params"]]
    assert norms == pytest.approx([8**0.5 * 0.85, 6**0.5 * 0.85, 0.0], rel=1e-5)


def test_without_renormalization_the_norm_is_kept():
    tensors = small((8, 12))
    for name in ("grads", "momentum_buffers"):
        tensors[name] = [torch.zeros_like(t) for t in tensors[name]]
    before = tensors["params"][0].clone()
    fused.muon(**tensors, renormalize=False)
    assert torch.equal(tensors["params"][0], before)


def test_options_of_the_iteration_count():
    tensors = small((8, 12))
    for options in ({"steps": 5}, {"coefficients": (3.4576, -4.7391, 2.0843)}, {"eps": 0.5}):
        own, exact = changed(tensors), changed(tensors)
        plain = changed(tensors)
        fused.muon(**own, **options, dtype=torch.float32)
        fused.muon(**plain, dtype=torch.float32)
        momentum = exact.pop("momentum")
        exact = in_float64(exact)
        kernels.reference.muon(**exact, **options, momentum=momentum, dtype=torch.float64)
        torch.testing.assert_close(own["params"][0].double(), exact["params"][0], rtol=0, atol=1e-5)
        assert (own["params"][0] - plain["params"][0]).abs().max() > 1e-4


def test_launches():
    """As many as newton_schulz alone: momentum rides on its first and the weights on its last."""
    with captured_launches() as launches:
        fused.muon(**small((32, 24, 3, 3), (64, 64), (90, 100)))
    assert len(launches) == 12


def test_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"params\[0\] must be \[O, ...\] of at least 2 dimensions, found \[5\]"):
        fused.muon(**small((5,)))
    tensors = small((4, 6))
    tensors = {k: [v[0].T] if isinstance(v, list) else v for k, v in tensors.items()}
    with pytest.raises(ValueError, match=r"params\[0\] must have its first dimension slowest in memory"):
        fused.muon(**tensors)
    with pytest.raises(ValueError, match=r"shape_factor must be one of original, .*, found 'wide'"):
        fused.muon(**small((4, 6)), shape_factor="wide")
    with pytest.raises(ValueError, match="steps must be an integer of at least 1"):
        fused.muon(**small((4, 6)), steps=0)
