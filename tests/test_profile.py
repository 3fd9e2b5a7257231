"""`blink profile`: traces become parts, parts add up, what is counted is right, and the command prints it."""

import json

import pytest
import torch

from blink.__main__ import main
from blink.errors import UserError
from blink.experiments.profile import measure
from blink.experiments.profile.costs import step_costs
from blink.experiments.profile.measure import Comparison, Profile, Row
from blink.experiments.profile.report import comparison_lines, convolution_table, table
from blink.experiments.profile.trace import Work, matched_owners, steps_of
from blink.kernels.registry import Cost
from blink.model import backend, convolution
from blink.model.network import Network
from blink.training.recipes import AIR, HLB, RECIPES
from tests.oracle import DEVICE


def span(name, start, end, category="cpu_op", thread=1, **args):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": end - start, "tid": thread, "args": args}


def mark(start, end, thread=1):
    return span("step", start, end, "user_annotation", thread)


def region(name, start, end):
    return span(f"part:{name}", start, end, "user_annotation")


def cpu_step(at):
    """100 us: a part of 30 forward and 20 backward, 10 of nobody's, and gaps."""
    return [
        mark(at, at + 95),
        # an operator that makes no graph node carries the number of the next that does
        span("aten::empty", at + 1, at + 3, **{"Sequence number": 7}),
        region("conv", at + 5, at + 45),
        span("_Conv", at + 6, at + 44, **{"Sequence number": 7}),
        span("aten::convolution", at + 10, at + 40),
        span("aten::inner", at + 12, at + 20),
        span("autograd::engine::evaluate_function: ConvBackward", at + 50, at + 75, **{"Sequence number": 7}),
        span("ConvBackward", at + 51, at + 74, **{"Sequence number": 7}),
        span("wgrad", at + 52, at + 64, "user_annotation"),
        span("aten::convolution_backward", at + 52, at + 64),
        span("aten::to", at + 65, at + 73),
        span("aten::add", at + 80, at + 88),
    ]


def cpu_trace():
    return {"traceEvents": [e for i in range(3) for e in cpu_step(1000 + 100 * i)]}


def test_operators_of_a_cpu_step_are_given_to_their_parts():
    steps = steps_of(cpu_trace(), on_gpu=False)
    assert len(steps) == 2
    for step in steps:
        assert step.length == 100
        assert step.by_owner() == {
            ("other", "fwd"): 2 + 8,
            ("conv", "fwd"): 30,
            ("conv", "wgrad"): 12,
            ("conv", "bwd"): 8,
        }
        assert step.idle == pytest.approx(100 - 60)


def kernel(name, start, end, correlation):
    return {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": end - start, "tid": 99,
            "args": {"correlation": correlation}}  # fmt: skip


def launched(at, number, kernels):
    """A GPU step whose host runs ahead: forward on one thread, backward on another."""
    c = number * 10
    return [
        mark(at, at + 20),
        region("conv", at + 1, at + 8),
        span("aten::conv2d", at + 2, at + 7, **{"Sequence number": 3}),
        span("cudaLaunchKernel", at + 3, at + 4, "cuda_runtime", correlation=c + 1),
        span("autograd::engine::evaluate_function: ConvBackward", at + 10, at + 15, thread=2, **{"Sequence number": 3}),
        span("dgrad", at + 11, at + 14, "user_annotation", thread=2),
        span("cuLaunchKernelEx", at + 12, at + 13, "cuda_driver", thread=2, correlation=c + 2),
        span("cudaMemsetAsync", at + 17, at + 18, "cuda_runtime", correlation=c + 3),
        *(kernel(name, start, end, c + i) for name, start, end, i in kernels),
    ]


def gpu_trace():
    events = []
    for number in range(3):
        device = 500 + 200 * number
        kernels = [("fprop", device, device + 60, 1), ("dgrad", device + 70, device + 150, 2)]
        events += launched(100 + 30 * number, number, [*kernels, ("Memset", device + 150, device + 155, 3)])
    return {"traceEvents": events}


def test_kernels_of_a_gpu_step_are_given_to_their_launches():
    steps = steps_of(gpu_trace(), on_gpu=True)
    assert len(steps) == 2
    for step in steps:
        assert step.by_owner() == {("conv", "fwd"): 60, ("conv", "dgrad"): 80, ("other", "fwd"): 5}
        assert (step.length, step.idle) == (200, 200 - 145)


def test_kernels_of_a_replay_take_the_owners_of_the_step_without_a_graph():
    eager = steps_of(gpu_trace(), on_gpu=True)[0].work
    events = []
    for number in range(3):
        host, device = 100 + 10 * number, 1000 + 100 * number
        events += [
            mark(host, host + 8),
            span("cudaGraphLaunch", host + 1, host + 5, "cuda_runtime", correlation=number),
        ]
        # the driver's own copy is nobody's
        names = ("Memcpy", "fprop", "dgrad", "Memset")
        events += [kernel(name, device + 20 * i, device + 20 * i + 15, number) for i, name in enumerate(names)]
    (first, _) = steps_of({"traceEvents": events}, True, eager)
    assert first.by_owner() == {("other", "fwd"): 30, ("conv", "fwd"): 15, ("conv", "dgrad"): 15}
    assert first.idle == pytest.approx(100 - 60)


def test_overlapping_kernels_leave_no_negative_gap():
    events = []
    for number in range(2):
        device = 500 + 100 * number
        kernels = [("a", device, device + 50, 1), ("b", device + 10, device + 80, 2)]
        events += launched(100 + 30 * number, number, kernels)
    assert steps_of({"traceEvents": events}, on_gpu=True)[0].idle == 20


def without_gpu_work(trace, but=()):
    return {"traceEvents": [e for e in trace["traceEvents"] if e["cat"] != "kernel" or e["args"]["correlation"] in but]}


GPU_STEP = steps_of(gpu_trace(), on_gpu=True)[0].work


@pytest.mark.parametrize(
    ("trace", "eager", "message"),
    [
        # the host's operators are all there, and their times must not pass for a GPU's
        (cpu_trace(), None, "0 pieces of GPU work, none in 3 of 3"),
        (without_gpu_work(gpu_trace()), None, "0 pieces of GPU work, none in 3 of 3"),
        (without_gpu_work(gpu_trace()), GPU_STEP, "0 pieces of GPU work, none in 3 of 3"),
        (without_gpu_work(gpu_trace(), but=(1, 2, 3, 21)), None, "4 pieces of GPU work, none in 1 of 3"),
        # launched by nothing that was recorded
        (
            {"traceEvents": [*cpu_trace()["traceEvents"], kernel("k", 1000, 1200, 5)]},
            None,
            "1 pieces of GPU work, none",
        ),
        ({"traceEvents": []}, None, "0 training steps"),
    ],
)
def test_a_trace_without_the_gpus_work_is_refused(trace, eager, message):
    with pytest.raises(UserError, match=message) as refused:
        steps_of(trace, True, eager)
    assert "\n" not in str(refused.value)


def test_matched_owners_survive_a_missing_kernel():
    eager = [Work(name, 0, 1, (name, "fwd")) for name in "abcde"]
    assert matched_owners(list("abde"), eager) == [(name, "fwd") for name in "abde"]


@pytest.mark.parametrize("recipe", [HLB, AIR], ids=lambda recipe: recipe.name)
def test_convolution_flops_are_those_that_pytorch_counts(recipe):
    """torch's FlopCounter on the reference network, forward and backward, and what the costs say of the same parts."""
    from torch.utils.flop_counter import FlopCounterMode

    network = Network(recipe.network, 10, (3, 32, 32), backend.eager())
    costs = step_costs(recipe, 4, 10, (3, 32, 32), 4)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        network(images).sum().backward()
    counted = counter.get_total_flops()
    ours = sum(cost.flops for (part, _), cost in costs.items() if ".conv" in part or part in ("head", "stem"))
    gates = sum(cost.flops for (part, _), cost in costs.items() if part.endswith(".se"))
    # the fused stem also counts its moments and folds its two products into one
    assert ours + gates == pytest.approx(counted, rel=0.02)


def test_counts_of_hlbs_first_pooling_and_of_a_muon_step_by_hand():
    costs = step_costs(HLB, 512, 10, (3, 32, 32), 4)
    x, windows = 512 * 128 * 31 * 31, 512 * 128 * 15 * 15
    # of y's two users both gradients and pooled twice, the index twice a quarter byte, dx
    assert costs["groups.0.norm1", "bwd"] == Cost((3 * 2 * windows + x) * 4 + windows // 4) == Cost(609_501_184)
    costs = step_costs(AIR, 2000, 10, (3, 32, 32), 2)
    filters = [(64, 216), (64, 576), (256, 576), *[(256, 2304)] * 3]
    vectors, head = 24 + 2 * 64 + 4 * 256, 10 * 256
    moved = 9 * 2 * sum(m * k for m, k in filters) + 5 * (4 * vectors + 2 * head)
    assert costs["optimizer", "fwd"] == Cost(moved, sum(3 * m * m * k + 9 * m**3 for m, k in filters))


def test_a_stem_of_several_calls_is_not_counted_in_part():
    parts = {part for part, _ in step_costs(RECIPES["hlb-3x3"], 8, 10, (3, 32, 32), 2)}
    assert "stem" not in parts and {"groups.0.conv1", "groups.2.se", "head", "loss", "optimizer"} <= parts


def profile_of(rows, idle=1.0):
    return Profile(rows, 10**9, 2 * 10**11, 2.0, idle, 10.0, 10.0, 1e12, 1e14, "fp16")


def test_table_fits_80_columns_and_adds_up():
    rows = [Row("groups.0.conv1", "fwd", 6.0, 10**9, 2 * 10**11, 2.0), Row("other", "fwd", 3.0, None, None, None)]
    lines = table(profile_of(rows))
    assert all(len(line) <= 80 for line in lines)
    text = "\n".join(lines)
    assert "60.0 %" in text and "30.0 %" in text and "10.0 %" in text and "33 %" in text
    assert "the parts differ by +0.0 %" in text and "copy 1,000 GB/s" in text


def test_convolution_rates_are_against_the_matrix_product():
    rows = [
        Row("groups.0.conv1", "fwd", 4.0, 10**9, 2 * 10**11, 2.0),
        Row("groups.0.conv1", "dgrad", 8.0, 10**9, 2 * 10**11, 2.0),
        Row("head", "fwd", 1.0, 10, 10, 0.0),
    ]
    lines = convolution_table(profile_of(rows))
    assert len(lines) == 5 and all(len(line) <= 80 for line in lines)
    assert "50.000" in lines[2] and "50 %" in lines[2]
    assert "25.000" in lines[3] and "33 %" in lines[4]


def test_a_share_above_the_roof_is_explained():
    rows = [
        Row("groups.0.conv1", "fwd", 1.0, 10**9, 2 * 10**11, 2.0),
        Row("groups.0.conv2", "fwd", 4.0, 1, 10**11, 1.0),
    ]
    lines = convolution_table(profile_of(rows))
    assert "200 %" in lines[2] and len(lines) == 7 and all(len(line) <= 80 for line in lines)
    assert lines[5].startswith("above 100 %: a convolution of fewer operations")
    whole = table(profile_of(rows))
    assert any("200 %" in line for line in whole) and lines[5] in whole and all(len(line) <= 80 for line in whole)
    assert "matrix product in fp16 100.00 TFLOP/s" in table(profile_of(rows))[-1]


def test_race_states_both_speed_ups():
    lines = comparison_lines(Comparison(500.0, 1000.0, 400.0, 800.0, 5))
    assert all(len(line) <= 80 for line in lines)
    assert "500.0 ms to 1000.0 ms a step: 2.00x" in lines[1]
    assert "50.0 %" in lines[2] and "2.00x" in lines[2] and lines[3].endswith("100 %")
    lines = comparison_lines(Comparison(250.0, 1000.0, 400.0, 800.0, 5))
    assert lines[3].endswith("300 %, as convolutions are faster too") and len(lines[3]) <= 80


@pytest.fixture
def small_cifar(tmp_path, monkeypatch):
    from tests.test_train_cli import make_tree

    monkeypatch.setenv("BLINK_CACHE", str(tmp_path / "cache"))
    return make_tree(tmp_path / "tree", size=16, images=4)


def test_profile_command(small_cifar, tmp_path, capsys):
    target = tmp_path / "profile.json"
    arguments = ["--data", small_cifar, "--recipe", "air", "--batch-size", "8", "--steps", "2", "--dtype", "fp32"]
    code = main(["profile", *arguments, "--device", "cpu", "--traces", str(tmp_path / "traces"), "--json", str(target)])
    printed = capsys.readouterr().out
    assert code == 0 and "groups.2.conv2" in printed and "against eager PyTorch" in printed
    content = json.loads(target.read_text())["profile"]
    named = {(row["part"], row["direction"]): row["ms"] for row in content["rows"]}
    for part in ("stem", "groups.0.norm1", "loss", "head"):
        assert named[part, "fwd"] > 0 and named[part, "bwd"] > 0
    for direction in ("fwd", "dgrad", "wgrad"):
        assert named["groups.1.conv2", direction] > 0
    assert named["optimizer", "fwd"] > 0 and ("batch", "fwd") in named
    assert content["parts_ms"] == pytest.approx(sum(named.values()) + content["idle_ms"])
    assert content["parts_ms"] == pytest.approx(content["profiled_ms"], rel=0.02)
    assert content["race"]["eager_convolution_ms"] > 0
    assert {p.name for p in (tmp_path / "traces").iterdir()} == {"trace.json.gz", "trace-eager.json.gz"}


def test_a_profiler_without_records_ends_the_command_in_one_line(small_cifar, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "steps_of", lambda trace, on_gpu, eager: steps_of(trace, True, eager))
    arguments = ["--data", small_cifar, "--recipe", "air", "--batch-size", "8", "--steps", "2", "--dtype", "fp32"]
    code = main(["profile", *arguments, "--device", "cpu", "--traces", str(tmp_path / "traces")])
    err = capsys.readouterr().err
    assert code == 2 and "0 pieces of GPU work" in err and err.count("\n") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fast", [False, True], ids=["bf16 in fp32", "bf16 as it is"])
def test_convolution_is_pytorchs(dtype, fast, monkeypatch):
    """Values and gradients of conv3x3 against float64; the weight's gradient keeps the weight's dtype."""
    monkeypatch.setattr(convolution, "fast_bf16", lambda: fast)
    x = torch.randn(3, 5, 7, 6, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(4, 5, 3, 3, device=DEVICE).contiguous(memory_format=torch.channels_last)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = convolution.conv3x3(x, weight)
    dy = torch.randn(y.shape, device=DEVICE).to(dtype)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    assert (y.dtype, dx.dtype, dweight.dtype) == (dtype, dtype, torch.float32)
    exact = [t.detach().to(dtype).double().requires_grad_() for t in (x, weight)]
    want = torch.nn.functional.conv2d(*exact, padding=1)
    want_dx, want_dweight = torch.autograd.grad(want, exact, dy.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for got, true in ((y, want), (dx, want_dx), (dweight, want_dweight)):
        assert (got.double() - true).abs().max() <= tolerance * true.abs().max()
    frozen = weight.detach()
    (only,) = torch.autograd.grad(convolution.conv3x3(x, frozen), x, dy)
    assert torch.equal(only, dx)
