"""newton_schulz: fused against the float64 iteration, its error against that of the standard iteration in its dtype."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blink import kernels
from blink.kernels import fused
from blink.kernels.examine.cases import further_cases, newton_schulz
from blink.kernels.launching import assumed_tensor_cores, captured_launches
from tests.oracle import DEVICE, DTYPES, in_float64, judge_lists, name_of, rms

# of the largest element. X is rounded once to `dtype`, every 3 steps, and small singular values, which the iteration
# raises 40-fold meanwhile, raise that rounding with them
TOLERANCES = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}
# of rank 3, 45 of 48 singular values are X's rounding and nothing else, and all are raised
RANK_3 = 1.5
# rms error over the standard iteration's in the same dtype: never above at 16 bits
TIMES_PYTORCH = {torch.float32: 2.0, torch.float16: 1.0, torch.bfloat16: 1.0}


def judged(case, dtype, change=lambda matrix: matrix, looser: float = 1.0):
    tensors = case.make(DEVICE, torch.float32)
    tensors = {"matrices": [change(m).to(dtype) for m in tensors["matrices"]]}
    judge_lists(case, tensors, dtype, looser * TOLERANCES[dtype], TIMES_PYTORCH[dtype])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "case",
    [
        # what shares the launches in each: one row, square, padded in either or both sizes, taller than wide
        newton_schulz([(1, 7), (5, 5), (70, 80), (64, 24, 3, 3)]),
        newton_schulz([(130, 3), (9, 65), (1, 1), (40, 1)]),
        newton_schulz([(20, 33)], steps=1),
        newton_schulz([(20, 33)], steps=2),
        # X is formed anew after three steps
        newton_schulz([(20, 33), (33, 20)], steps=4),
        newton_schulz([(20, 70)], steps=7),
    ],
    ids=lambda c: c.label,
)
def test_matches_float64(case, dtype):
    judged(case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_matches_float64_at_the_networks_shapes(dtype):
    (case,) = (case for case in further_cases() if case.op == "newton_schulz")
    judged(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("tensor_cores", [True, False])
def test_several_tiles_match_float64(tensor_cores, dtype):
    """A matrix of more than one large tile, the last half empty, beside one of a single small tile."""
    with assumed_tensor_cores(tensor_cores):
        judged(newton_schulz([(150, 200), (20, 33)], steps=2), dtype)


@settings(max_examples=5, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=3),
    steps=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shapes(shapes, steps, dtype):
    case = newton_schulz(shapes, steps=steps)
    judge_lists(case, case.make(DEVICE, dtype), dtype, TOLERANCES[dtype] * 3, times_pytorch=None)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_any_scale(scale, dtype):
    """Gradients whose squares leave float16, and whose elements nearly do."""
    judged(newton_schulz([(24, 50)]), dtype, lambda matrix: matrix * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("kind", ["rank 3", "wide spectrum", "one element", "equal rows"])
def test_hard_spectra(kind, dtype):
    m, k = 48, 100

    def change(matrix):
        if kind == "rank 3":
            return matrix[:, :3] @ matrix[:3]
        if kind == "one element":
            return (
                torch.zeros_like(matrix)
                .index_fill_(0, torch.tensor([3], device=DEVICE), 0)
                .masked_fill_(torch.arange(matrix.numel(), device=DEVICE).view_as(matrix) == 321, 2.0)
            )
        if kind == "equal rows":
            return matrix[:1].expand(m, k).contiguous()
        u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        return (u * torch.logspace(0, -5, m, device=DEVICE, dtype=torch.float64) @ v).float()

    judged(newton_schulz([(m, k)]), dtype, change, RANK_3 if kind == "rank 3" else 1.0)


def test_in_float16_beats_bfloat16_eightfold():
    """Why float16 is the default: against Muon's standard bfloat16 iteration, on the network's smallest filter."""
    matrices = [torch.randn(64, 216, device=DEVICE)]
    (truth,) = kernels.reference.newton_schulz([matrices[0].double()], dtype=torch.float64)
    ours = rms(fused.newton_schulz(matrices)[0].double() - truth)
    theirs = rms(kernels.reference.newton_schulz(matrices, dtype=torch.bfloat16)[0].double() - truth)
    assert ours <= theirs / 8


def test_singular_values_move_towards_one():
    (result,) = fused.newton_schulz([torch.randn(24, 60, device=DEVICE)], steps=5)
    values = torch.linalg.svdvals(result.double())
    assert values.min() > 0.6 and values.max() < 1.3


def test_zeros_stay_zeros():
    zeros, other = torch.zeros(5, 9, device=DEVICE), torch.randn(5, 9, device=DEVICE)
    result = fused.newton_schulz([zeros, other], steps=4)
    assert torch.equal(result[0], zeros) and result[1].isfinite().all()


def test_nan_stays_in_its_matrix():
    bad, good = torch.ones(5, 9, device=DEVICE), torch.randn(5, 9, device=DEVICE)
    bad[2, 3] = float("nan")
    result = fused.newton_schulz([bad, good])
    assert result[0].isnan().all() and result[1].isfinite().all()


def test_result_does_not_depend_on_its_company():
    matrices = [torch.randn(s, device=DEVICE) for s in ((20, 33), (70, 80), (33, 20), (5, 64))]
    together = fused.newton_schulz(matrices)
    for matrix, result in zip(matrices, together):
        (alone,) = fused.newton_schulz([matrix])
        torch.testing.assert_close(result, alone, rtol=0, atol=0 if kernels.interpreting() else 1e-5)


def test_a_transpose_gives_the_transpose():
    matrix = torch.randn(20, 70, device=DEVICE)
    wide, tall = fused.newton_schulz([matrix, matrix.T.contiguous()])
    torch.testing.assert_close(tall.T, wide, rtol=0, atol=1e-6)


def test_more_matrices_than_a_launch_takes():
    case = newton_schulz([(3, size) for size in range(3, 21)], steps=1)
    judge_lists(case, case.make(DEVICE, torch.float32), torch.float32, TOLERANCES[torch.float32], None)


def test_results_keep_their_matrix_dtype():
    matrices = [torch.randn(4, 6, device=DEVICE), torch.randn(4, 6, device=DEVICE).half()]
    results = fused.newton_schulz(matrices)
    assert [r.dtype for r in results] == [torch.float32, torch.float16]
    truths = kernels.reference.newton_schulz(in_float64({"m": matrices})["m"], dtype=torch.float64)
    for result, truth in zip(results, truths):
        assert (result.double() - truth).abs().max() <= TOLERANCES[torch.float16]


@pytest.mark.parametrize("steps, dtype, expected", [(1, 16, 5), (3, 16, 12), (5, 16, 20), (3, 32, 13)])
def test_launches(steps, dtype, expected):
    """All of the network's filters together: gather, X X^T and its sum, 1 to 8 with m x m products, Q X."""
    case = newton_schulz([(32, 24, 3, 3), (64, 64), (90, 100)], steps=steps)
    with captured_launches() as launches:
        case.call(fused, case.make(DEVICE, torch.float32), getattr(torch, f"float{dtype}"))
    assert len(launches) == expected


def test_tiles_are_smaller_without_tensor_cores():
    case, found = newton_schulz([(200, 300)]), {}
    for present in (True, False):
        with assumed_tensor_cores(present), captured_launches() as launches:
            case.call(fused, case.make(torch.device("cpu"), torch.float32), torch.float16)
        found[present] = {launch.constexprs["TILE"] for launch in launches if "TILE" in launch.constexprs}
    assert found == {True: {128}, False: {64}}


def test_refuses_what_it_cannot_do():
    good = [torch.randn(4, 6, device=DEVICE)]
    with pytest.raises(ValueError, match=r"matrices\[1\] must be \[m, k\] and not empty, found \[4, 6, 1\]"):
        fused.newton_schulz([*good, good[0][:, :, None]])
    with pytest.raises(ValueError, match=r"matrices\[0\] must be contiguous"):
        fused.newton_schulz([good[0].T])
    with pytest.raises(ValueError, match="steps must be an integer of at least 1, found 0"):
        fused.newton_schulz(good, steps=0)
    with pytest.raises(ValueError, match="coefficients must be three finite numbers"):
        fused.newton_schulz(good, coefficients=(3.0, -4.0))
    with pytest.raises(ValueError, match="eps must be positive"):
        fused.newton_schulz(good, eps=0.0)
    with pytest.raises(TypeError, match="dtype must be float32, float16 or bfloat16, found int8"):
        fused.newton_schulz(good, dtype=torch.int8)
