"""gather: the whitening ops on images of a data set, against the batch that plain PyTorch makes of them."""

from dataclasses import fields, replace
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from blink import kernels
from blink.kernels import Gather, fused
from blink.kernels.examine.cases import GATHER_PARTS, images, whiten, whiten_project_norm_act
from blink.kernels.gather import gathered
from tests.oracle import DEVICE, DTYPES, directional_derivative_matches, judge, judge_on, name_of, run
from tests.test_whiten import TOLERANCES as WHITEN
from tests.test_whiten_project_norm_act import TOLERANCES as STEM

PIXEL_PARTS = tuple(part for part in GATHER_PARTS if part != "jitter")


def subsets(parts: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [chosen for count in range(len(parts) + 1) for chosen in combinations(parts, count)]


def tolerance_of(case, dtype):
    return (WHITEN if case.op == "whiten" else STEM)[dtype]


def gather_of(tensors: dict, case) -> Gather:
    given = {**tensors, **case.options}
    return Gather(**{f.name: given[f"gather.{f.name}"] for f in fields(Gather) if f"gather.{f.name}" in given})


# the batch itself


def long_way(image, gather, b, mean):
    """Image b [C, H, W] uint8, pixel by pixel, before the jitter."""
    _, height, width = image.shape
    move_y, move_x = (0, 0) if gather.translation is None else gather.translation[b].tolist()
    padded = F.pad(image.double()[None], (width - 1, width - 1, height - 1, height - 1), mode="reflect")[0]
    top, left = height - 1 + move_y, width - 1 + move_x
    out = padded[:, top : top + height, left : left + width].to(torch.uint8)
    if gather.flip is not None and gather.flip[b]:
        out = out.flip(2)
    if gather.cutout is not None:
        top, left = gather.cutout[b].tolist()
        for y in range(max(0, top), min(height, top + gather.cutout_size)):
            for x in range(max(0, left), min(width, left + gather.cutout_size)):
                out[:, y, x] = torch.tensor([int(255 * m + 0.5) for m in mean.tolist()])
    return out


@pytest.mark.parametrize("parts", subsets(PIXEL_PARTS), ids="-".join)
def test_batch_is_what_the_fields_say(parts):
    case = whiten(6, 5, 7, 4, gather=parts)
    tensors = case.make(torch.device("cpu"), torch.float32)
    gather = gather_of(tensors, case)
    out = gathered(tensors["images"], gather, tensors["mean"])
    assert out.dtype == torch.uint8 and out.is_contiguous(memory_format=torch.channels_last)
    for b, source in enumerate(gather.index.tolist()):
        assert torch.equal(out[b], long_way(tensors["images"][source], gather, b, tensors["mean"]))


def test_normalized_after_the_jitter():
    case = whiten(4, 5, 6, 3, gather=GATHER_PARTS)
    tensors = case.make(torch.device("cpu"), torch.float32)
    gather, mean, std = gather_of(tensors, case), tensors["mean"], tensors["std"]
    x = kernels.reference.normalize(tensors["images"], mean, std, torch.float64, gather)
    pixels = gathered(tensors["images"], gather, mean).double() / 255
    for b, (contrast, brightness) in enumerate(gather.jitter.double().tolist()):
        want = (contrast * pixels[b] + brightness - mean.double()[:, None, None]) / std.double()[:, None, None]
        torch.testing.assert_close(x[b], want)


# fused against float64


def both_ops(*arguments, **options):
    return [whiten(*arguments, **options), whiten_project_norm_act(*arguments, **options)]


# of so few values that which of two errors is the smaller is luck
SMALL = [case for parts in subsets(GATHER_PARTS) for case in both_ops(3, 6, 7, 12, gather=parts)]
SMALL += [
    *both_ops(1, 5, 9, 5, gather=GATHER_PARTS, activation="silu"),
    *both_ops(1, 8, 3, 40, kernel=3, gather=GATHER_PARTS, activation="relu"),
    *both_ops(2, 7, 5, 12, image_channels=1, gather=GATHER_PARTS, activation=None),
    *both_ops(2, 6, 5, 24, image_channels=4, gather=("jitter",)),
    whiten(2, 6, 5, 12, activation=None, gather=("translation", "flip")),
    whiten_project_norm_act(2, 6, 7, 12, training=False, gather=("translation", "flip")),
    whiten_project_norm_act(2, 6, 7, 12, training=False, gather=GATHER_PARTS),
]
LARGE = [
    *both_ops(2, 32, 32, 32, gather=("translation", "flip")),
    *both_ops(2, 32, 32, 32, gather=GATHER_PARTS),
    # more than 1024 positions: an image's moments take two exact sums
    whiten_project_norm_act(2, 35, 34, 8, gather=GATHER_PARTS),
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", SMALL + LARGE, ids=lambda c: f"{c.op}-{c.label}")
def test_matches_float64(case, dtype):
    judge(case, dtype, tolerance_of(case, dtype), versus_pytorch=case in LARGE)


@settings(max_examples=10, deadline=None)
@given(
    make=st.sampled_from([whiten, whiten_project_norm_act]),
    batch=st.integers(1, 3),
    height=st.integers(4, 10),
    width=st.integers(4, 10),
    channels=st.integers(4, 24),
    kernel=st.sampled_from([2, 3]),
    parts=st.sampled_from(subsets(GATHER_PARTS)),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(make, batch, height, width, channels, kernel, parts, dtype):
    # as in the tests without gather, an eps that bounds the rounding of a channel of almost no variance
    options = {} if make is whiten else {"eps": 1e-2}
    case = make(batch, height, width, channels, kernel, gather=parts, **options)
    judge(case, dtype, tolerance_of(case, dtype).loosened(10), versus_pytorch=False)


@pytest.mark.parametrize("case", both_ops(5, 6, 5, 8, gather=GATHER_PARTS), ids=lambda c: c.op)
def test_repeated_images_and_any_order(case):
    tensors = case.make(DEVICE, torch.float32)
    tensors["gather.index"] = torch.tensor([7, 0, 7, 7, 9], device=DEVICE)
    judge_on(case, tensors, torch.float32, tolerance_of(case, torch.float32), versus_pytorch=False)


@pytest.mark.parametrize("case", both_ops(2, 5, 4, 3, gather=GATHER_PARTS), ids=lambda c: c.op)
def test_directional_derivative(case):
    if "eps" in case.options:
        case = replace(case, options={**case.options, "eps": 1e-3})
    directional_derivative_matches(case)


def test_jittered_moments_of_many_images():
    """More images than are combined at a time."""
    case = whiten_project_norm_act(35, 4, 5, 6, gather=GATHER_PARTS)
    judge(case, torch.float32, STEM[torch.float32], versus_pytorch=False)


def test_jittered_statistics_of_nearly_equal_pixels():
    """Images of 200 and 201 only, one jitter for all: float64 moments lose nothing that shows in float32."""
    case = whiten_project_norm_act(4, 9, 9, 8, gather=("translation", "jitter"))
    tensors = case.make(DEVICE, torch.float32)
    tensors["images"] = (200 + torch.randint(0, 2, (8, 9, 9, 3), dtype=torch.uint8)).permute(0, 3, 1, 2).to(DEVICE)
    tensors["gather.jitter"] = torch.tensor([[0.8, 0.1]], device=DEVICE).repeat(4, 1)
    y = case.call(fused, dict(tensors), torch.float32)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
    want = case.call(kernels.reference, exact, torch.float64)
    # as without a jitter, z is a float32 difference of numbers 100 times its size
    assert (y.double() - want).abs().max() <= 3e-5 * want.abs().max()


# fused against itself


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("parts", subsets(PIXEL_PARTS), ids="-".join)
@pytest.mark.parametrize("make", [whiten, whiten_project_norm_act])
def test_bitwise_what_the_built_batch_gives(make, parts, dtype):
    case = make(4, 7, 6, 12, gather=parts)
    tensors = case.make(DEVICE, dtype)
    built = {name: value for name, value in tensors.items() if not name.startswith("gather.")}
    built["images"] = gathered(tensors["images"], gather_of(tensors, case), tensors["mean"])
    upstream = torch.randn(4, 12, 6, 5, device=DEVICE)
    got = run(case, fused, tensors, dtype, upstream)
    want = run(make(4, 7, 6, 12), fused, built, dtype, upstream)
    assert set(got) == set(want)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("case", both_ops(4, 6, 5, 8, gather=("translation",)), ids=lambda c: c.op)
def test_a_translation_beyond_the_image_is_clamped(case):
    """No value reads outside the data set: it acts as the largest translation."""
    tensors = case.make(DEVICE, torch.float32)
    far = torch.tensor([[6, 5], [-6, -5], [2**62, -(2**62)], [2**31, -(2**33)]], device=DEVICE)
    limit = torch.tensor([5, 4], device=DEVICE)
    got = case.call(fused, {**tensors, "gather.translation": far}, torch.float32)
    want = case.call(fused, {**tensors, "gather.translation": far.clamp(-limit, limit)}, torch.float32)
    assert torch.equal(got, want)


def test_int32_translation_far_cutout_and_strided_fields():
    case = whiten(3, 6, 5, 8, gather=GATHER_PARTS)
    tensors = case.make(DEVICE, torch.float32)
    tensors["gather.cutout"] = torch.tensor([[2**40, 0], [0, -(2**40)], [4, 3]], device=DEVICE)
    want = case.call(fused, dict(tensors), torch.float32)
    tensors["gather.translation"] = tensors["gather.translation"].to(torch.int32)
    for name in ("gather.index", "gather.translation", "gather.cutout", "gather.jitter", "gather.flip"):
        tensors[name] = tensors[name].repeat_interleave(2, 0)[::2]
    assert torch.equal(case.call(fused, tensors, torch.float32), want)
    judge_on(case, tensors, torch.float32, WHITEN[torch.float32], versus_pytorch=False)


def test_a_mean_beyond_the_pixel_range_fills_with_its_end():
    case = whiten(2, 4, 5, 6, gather=("cutout",))
    tensors = case.make(DEVICE, torch.float32)
    tensors["mean"] = torch.tensor([-0.1, 1.2, 0.5 / 255], device=DEVICE)
    judge_on(case, tensors, torch.float32, WHITEN[torch.float32], versus_pytorch=False)


def test_refuses_what_it_cannot_do():
    case = whiten_project_norm_act(2, 4, 4, 3, gather=GATHER_PARTS)
    made = case.make(DEVICE, torch.float32)
    plain = {name: value for name, value in made.items() if not name.startswith("gather.")}
    good = gather_of(made, case)

    def call(op=fused.whiten_project_norm_act, arguments=plain, **changed):
        return op(**arguments, gather=replace(good, **changed))

    call()
    with pytest.raises(TypeError, match="must be a Gather, found Tensor"):
        fused.whiten_project_norm_act(**plain, gather=good.index)
    with pytest.raises(ValueError, match=r"gather.index must be \[B\] and not empty, found \[0\]"):
        call(index=good.index[:0])
    with pytest.raises(ValueError, match=r"gather.index must be \[B\]"):
        call(index=good.index[None])
    with pytest.raises(TypeError, match="index must be int64, found int32"):
        call(index=good.index.int())
    with pytest.raises(ValueError, match=r"gather.translation must be \[2, 2\], found \[2\]"):
        call(translation=good.translation[0])
    with pytest.raises(TypeError, match="translation must be int64 or int32, found float32"):
        call(translation=good.translation.float())
    with pytest.raises(ValueError, match=r"gather.flip must be \[2\], found \[1\]"):
        call(flip=good.flip[:1])
    with pytest.raises(TypeError, match="flip must be bool, found int64"):
        call(flip=good.flip.long())
    with pytest.raises(TypeError, match="jitter must be float32, found float64"):
        call(jitter=good.jitter.double())
    with pytest.raises(ValueError, match="jitter gets no gradient"):
        call(jitter=good.jitter.clone().requires_grad_())
    with pytest.raises(TypeError, match="cutout must be int64, found int32"):
        call(cutout=good.cutout.int())
    for changed in ({"cutout": None}, {"cutout_size": 0}, {"cutout_size": -1}):
        with pytest.raises(ValueError, match="cutout_size are given together"):
            call(**changed)
    with pytest.raises(ValueError, match="one device"):
        call(index=good.index.to("meta"))
    with pytest.raises(TypeError, match="gather needs uint8 images, found float32"):
        floating = torch.randn(4, 3, 4, 4, device=DEVICE).contiguous(memory_format=torch.channels_last)
        call(fused.whiten, {"images": floating, "weight": torch.randn(3, 3, 2, 2, device=DEVICE)})
    with pytest.raises(TypeError, match="gather needs uint8 images, found float32"):
        call(kernels.reference.whiten, {"images": floating, "weight": torch.randn(3, 3, 2, 2, device=DEVICE)})


def test_one_value_per_channel_is_counted_over_the_batch():
    """A data set of many images, of which the batch takes one of one position."""
    case = whiten_project_norm_act(1, 2, 2, 3, gather=())
    with pytest.raises(ValueError, match="more than 1 value per channel, found 1"):
        case.call(fused, case.make(DEVICE, torch.float32), torch.float32)


def test_the_data_set_is_not_copied():
    case = whiten(2, 5, 4, 6, gather=("translation", "flip"))
    tensors = case.make(DEVICE, torch.float32)
    y = case.call(fused, {**tensors, "bias": tensors["bias"].requires_grad_()}, torch.float32)
    saved = [t for t in y.grad_fn.saved_tensors if t is not None and t.dtype == torch.uint8]
    assert [t.data_ptr() for t in saved] == [tensors["images"].data_ptr()]


def test_images_of_a_case_are_twice_the_batch():
    """So that an op that reads the batch's own rows instead of the index is caught."""
    tensors = whiten(3, 5, 4, 6, gather=()).make(DEVICE, torch.float32)
    assert tensors["images"].shape[0] == 6 and tensors["gather.index"].shape == (3,)
    assert not torch.equal(tensors["gather.index"], torch.arange(3, device=DEVICE))
    assert images(DEVICE, 2, 4, 4).is_contiguous(memory_format=torch.channels_last)
