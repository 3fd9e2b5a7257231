"""The benchmark: counted bytes and FLOPs, the gate that refuses wrong results, its JSON, comparison and mistakes."""

import json
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torchvision import models
from torchvision.ops import SqueezeExcitation

from blink.__main__ import main
from blink.kernels import environment, reference
from blink.kernels.examine import cases
from blink.kernels.examine.bench import command as bench
from blink.kernels.examine.bench import measure, plot, providers, report
from blink.training.recipes import RECIPES
from tests.oracle import DEVICE

SMALL = ["squeeze_excite", "--shapes", "2x4x3x5", "--providers", "fused,eager", "--dtype", "float32", "--quick"]


# hand counts at batch 2: [2, 4, 3, 5] activations hold 120 values, 4x5 images 3 x 4 patches of 2x2 each
@pytest.mark.parametrize(
    "case, which, moved, flops",
    [
        # images 2*4*5*3 = 120 bytes, 2*3*4 = 24 positions of 6 filters: 144 values; 24 * 6 * 12 multiply-adds
        (cases.whiten(2, 4, 5, 6), "fwd", 120 + 144 * 2, 2 * 24 * 6 * 12),
        (cases.whiten(2, 4, 5, 6), "bwd", 120 + 144 * 2, 2 * 24 * 6 * 12),
        (cases.whiten(2, 4, 5, 6, activation=None), "bwd", 144 * 2, 0),
        # images twice; moments are 24 * 12 * 12 multiply-adds more
        (cases.whiten_project_norm_act(2, 4, 5, 6), "fwd", 240 + 144 * 2, 2 * (24 * 6 * 12 + 24 * 12 * 12)),
        (cases.whiten_project_norm_act(2, 4, 5, 6), "bwd", 120 + 144 * 2, 2 * 2 * 24 * 6 * 12),
        # [2, 8] float32 is 64 bytes, [2, 3] is 24, both weights 48 values of 2 bytes
        (cases.se_gate(2, 8, 3), "fwd", 2 * 64 + 24 + 96, 2 * 2 * 2 * 8 * 3),
        (cases.se_gate(2, 8, 3), "bwd", 6 * 64 + 4 * 24 + 96 + 48 * 4, 4 * 2 * 2 * 8 * 3),
        # 120 values of 2 bytes: x twice, residual, y
        (cases.excite_norm_act_add(2, 4, 3, 5), "fwd", 4 * 240, 0),
        (cases.excite_norm_act_add(2, 4, 3, 5, residual=False, training=False), "fwd", 2 * 240, 0),
        (cases.norm_act(2, 4, 3, 5), "fwd", 3 * 240, 0),
        (cases.norm_act(2, 4, 3, 5), "bwd", 5 * 240, 0),
        # dy and x twice, dx
        (cases.excite_norm_act_add(2, 4, 3, 5), "bwd", 5 * 240, 0),
        (cases.squeeze_excite(2, 4, 3, 5, 2), "fwd", 2 * 240, 2 * 2 * 2 * 4 * 2),
        (cases.squeeze_excite(2, 4, 3, 5, 2), "bwd", 3 * 240, 4 * 2 * 2 * 4 * 2),
        # x holds 2*4*5*4 = 160 values, pooled 2*4*2*2 = 32, the index 32 / 4 bytes
        (cases.pool_norm_act(2, 4, 5, 4), "fwd", 320 + 3 * 64 + 8, 0),
        (cases.pool_norm_act(2, 4, 5, 4), "bwd", 4 * 64 + 8 + 320, 0),
        # a second gradient of y is read twice too
        (cases.pool_norm_act(2, 4, 5, 4, fork=True), "bwd", 6 * 64 + 8 + 320, 0),
        # 20 logits of 2 bytes, 2 labels of 8, 2 pairs of float32
        (cases.cross_entropy(2, 10), "fwd", 40 + 16 + 16, 0),
        (cases.cross_entropy(2, 10), "bwd", 2 * 40 + 16 + 16, 0),
        # 4 * 3 * 9 = 108 values of 2 bytes and 4 of float32, each read three times and written twice
        (cases.sgd_nesterov([(4, 3, 3, 3), (4,)]), "fwd", 5 * (108 * 2 + 4 * 4), 0),
        # [4, 27]: half of X X^T, Q X, and 9 halves of 4x4 products
        (cases.newton_schulz([(4, 3, 3, 3)]), "fwd", 4 * 108 * 2, 3 * 16 * 27 + 9 * 64),
        (cases.muon([(4, 3, 3, 3)]), "fwd", 9 * 108 * 2, 3 * 16 * 27 + 9 * 64),
    ],
    ids=lambda value: value.op if isinstance(value, cases.Case) else None,
)
def test_counts_match_hand_counts(case, which, moved, flops):
    assert case.cost(2)[which] == cases.Cost(moved, flops)


@pytest.mark.parametrize("case", cases.small_cases(), ids=lambda case: case.op)
def test_every_pass_has_a_cost(case):
    assert set(case.cost(2)) == ({"fwd", "bwd"} if case.differentiable else {"fwd"})
    for which in case.cost(2):
        assert case.cost(2)[which].bytes > 0
        assert case.cost(4)[which].bytes > case.cost(2)[which].bytes


def test_shapes_make_a_case_of_every_op():
    for op in bench.OPS:
        case = cases.case_at(op, 2, 16, 5, 5)
        assert case.op == op
        case.call(reference, case.make(torch.device("cpu"), torch.float32), torch.float32)


def test_recorded_cases_are_the_calls_of_a_recipes_steps():
    """blink's: in the phases of its first layer's bias, of small images and of whole ones; nothing twice."""
    shapes = defaultdict(list)
    for case in cases.recipe_cases("blink", 20):
        first = next(iter(case.arguments.values()))
        shapes[case.op].append([v.shape for v in first] if isinstance(first, list) else first.shape)
    pooled = [
        (20, 64, 23, 23),
        (20, 256, 11, 11),
        (20, 256, 5, 5),
        (20, 64, 31, 31),
        (20, 256, 15, 15),
        (20, 256, 7, 7),
    ]
    filters = [(64, 24, 3, 3), (64, 64, 3, 3), (256, 64, 3, 3), *[(256, 256, 3, 3)] * 3]
    vectors = [*[(64,)] * 2, *[(256,)] * 4]
    assert shapes == {
        # the data set, of two batches
        "whiten": [(40, 3, 24, 24), (40, 3, 32, 32)],
        "pool_norm_act": pooled,
        "excite_norm_act_add": [(b, c, h // 2, w // 2) for b, c, h, w in pooled],
        "cross_entropy": [(20, 10)],
        "sgd_nesterov": [[*vectors, (24,)], [(10, 256)], vectors],
        "muon": [filters],
    }


@pytest.mark.parametrize("name", RECIPES)
def test_a_recorded_case_can_be_called(name):
    """With a gradient where there is one, from random arguments of its shapes."""
    ops = set()
    for case in cases.recipe_cases(name, 2):
        if case.op not in ops:
            ops.add(case.op)
            assert providers.truth_of(case, case.make(torch.device("cpu"), torch.float32))


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenet_v3_small", "regnet_y_400mf"])
def test_recorded_blocks_are_those_that_the_model_runs(name):
    """Seen by hooks on the model that torchvision makes, with the layers of each block."""
    seen = []

    def note(block, inputs, y):
        layers = (type(layer).__name__.lower() for layer in (block.activation, block.scale_activation))
        seen.append((tuple(inputs[0].shape), tuple(block.fc1.weight.shape), *layers))

    model = models.get_model(name).eval()
    for module in model.modules():
        if isinstance(module, SqueezeExcitation):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    recorded = [
        (c.arguments["x"].shape, c.arguments["weight1"].shape, c.options["activation"], c.options["gate_activation"])
        for c in cases.model_cases(name, 1)
    ]
    assert recorded == list(dict.fromkeys(seen))


def test_recorded_updates_are_of_the_models_parameters():
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in models.resnet50().parameters()]
    sgd, muon = cases.model_cases("resnet50")
    assert [p.shape for p in sgd.arguments["params"]] == shapes
    assert [p.shape for p in muon.arguments["params"]] == [shape for shape in shapes if len(shape) > 1]
    assert cases.model_cases("resnet50", 2)[1].arguments["params"][0].shape == (8, 4, 7, 7)


def test_every_provider_is_drawn():
    assert list(plot.STYLE) == list(providers.PROVIDERS)


def test_a_row_of_a_gpu_fits_the_screen():
    times = dict(status="timed", median=123e3, low=122e3, high=124e3, graph=121e3, gb_s=2345.0, tflop_s=123.45)
    times |= dict(roofline=0.87, peak_bytes=1234 << 20)
    row = dict(op="muon", case="54-tensors", dtype="float16", bytes=1e9, copy=1e5, flops=1e12, ratio=0.5)
    lines = report.format_row(row | {"pass": "fwd", "providers": {"fused": times, "optim-muon": times}}).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert sum("123.0ms [122.0ms 124.0ms] graph 121.0ms" in line for line in lines) == 2
    assert " ".join(lines).count("+1234 MiB") == 2


def broken(how):
    """A provider whose squeeze_excite is wrong in one way."""

    def squeeze_excite(x, activation, **weights):
        y = reference.squeeze_excite(x, **weights, activation=activation)
        if how == "forward":
            return y * 1.01
        if how == "nan":
            return y.masked_fill(y == y.max(), float("nan"))
        return y.detach() + (x * 1.05 - (x * 1.05).detach()) + sum((w - w.detach()).sum() for w in weights.values())

    return providers.functions(SimpleNamespace(squeeze_excite=squeeze_excite))


@pytest.mark.parametrize("how", ["forward", "nan", "gradient"])
def test_a_wrong_provider_gets_no_time(how, monkeypatch, capsys, tmp_path):
    load = providers.load
    monkeypatch.setattr(providers, "load", lambda name, *of: broken(how) if name == "eager" else load(name, *of))
    out = tmp_path / "out.json"
    assert main(["bench", *SMALL, "--json", str(out)]) == 1
    assert "WRONG" in capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    for row in rows:
        assert row["providers"]["eager"]["status"] == "wrong"
        assert "time" not in row["providers"]["eager"]
        assert row["ratio"] is None


def test_json_of_a_run(capsys, tmp_path):
    out = tmp_path / "out.json"
    assert main(["bench", *SMALL, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines()[1:]), printed
    content = json.loads(out.read_text())
    assert content["schema"] == 1
    assert {"device", "torch", "triton", "commit"} <= set(content["environment"])
    assert content["matmul_flop_s"]["float32"] > 0
    assert [row["pass"] for row in content["rows"]] == ["fwd", "bwd"]
    for row in content["rows"]:
        assert {"op", "pass", "case", "dtype", "bytes", "flops", "copy", "providers", "ratio"} == set(row)
        eager = row["providers"]["eager"]
        assert eager["status"] == "timed"
        assert 0 < eager["low"] <= eager["median"] <= eager["high"]
        assert eager["gb_s"] == pytest.approx(row["bytes"] / eager["time"] / 1e3)
        assert eager["roofline"] > 0 and eager["error"] <= eager["tolerance"]
        assert row["providers"]["fused"]["status"] == ("timed" if DEVICE.type == "cuda" else "interpreted")
    if DEVICE.type == "cpu":
        assert "interpreted: not timed" in printed


def test_what_was_measured_before_an_interrupt_is_written(monkeypatch, capsys, tmp_path):
    measured, calls = bench.rows_of, []

    def race(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measured(*arguments)

    monkeypatch.setattr(bench, "rows_of", race)
    target = tmp_path / "bench.json"
    assert main(["bench", *SMALL[:2], "2x3x5x4,2x3x5x8", *SMALL[3:-1], "--json", str(target)]) == 130
    rows = json.loads(target.read_text())["rows"]
    assert [row["pass"] for row in rows] == ["fwd", "bwd"] and len({row["case"] for row in rows}) == 1


def test_a_provider_that_cannot_run_is_skipped_with_its_reason(monkeypatch, capsys):
    def load(name, case, dtype):
        raise RuntimeError("torch.compile needs a C++ compiler here, and there is none")

    monkeypatch.setattr(providers, "load", load)
    assert main(["bench", *SMALL[:3], "--providers", "compile", "--dtype", "float32", "--quick"]) == 0
    assert "skipped: torch.compile needs a C++ compiler" in capsys.readouterr().out


def test_fused_kernels_that_fail_fail_the_run(monkeypatch, capsys):
    def explode(**arguments):
        raise ValueError("no such kernel")

    load = providers.load
    failing = providers.functions(SimpleNamespace(squeeze_excite=explode))
    for name, code in (("fused", 1), ("eager", 0)):
        monkeypatch.setattr(providers, "load", lambda n, *of, name=name: failing if n == name else load(n, *of))
        assert main(["bench", *SMALL]) == code
        assert "FAILED: ValueError: no such kernel" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's compiler needs no C++ compiler")
def test_missing_compiler_is_noticed(monkeypatch):
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"C\+\+ compiler"):
        providers.load("compile", cases.small_cases()[0], torch.float32)


def entry(time, status="timed", spread=0.01):
    low, high = time * (1 - spread), time * (1 + spread)
    return {"status": status, "time": time, "median": time, "low": low, "high": high, "graph": None}


def result(**times):
    row = {"op": "whiten", "pass": "fwd", "case": "c", "dtype": "float16"}
    return {"rows": [{**row, "providers": {name: entry(*v) for name, v in times.items()}}]}


@pytest.mark.parametrize(
    "after, regressions",
    [
        (result(fused=(100,), eager=(200,)), 0),
        (result(fused=(104,), eager=(200,)), 0),  # inside the band
        (result(fused=(120,), eager=(200,)), 1),
        (result(fused=(120, "timed", 0.5), eager=(200,)), 0),  # quantiles overlap
        (result(fused=(50,), eager=(200,)), 0),
        (result(fused=(100, "wrong"), eager=(200,)), 1),
        (result(fused=(100,)), 1),  # a provider vanished
        ({"rows": []}, 2),
    ],
)
def test_compare(after, regressions):
    before = result(fused=(100,), eager=(200,))
    lines, found = report.compare(before, after, band=0.05)
    assert found == regressions
    assert len(lines) == 2


def test_compare_command(tmp_path, capsys):
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path, time in zip(paths, (100, 130)):
        path.write_text(json.dumps({"schema": 1, **result(fused=(time,))}))
    assert main(["bench", "--compare", str(paths[0]), str(paths[0])]) == 0
    assert main(["bench", "--compare", *map(str, paths)]) == 1
    assert "+30.0% REGRESSION" in capsys.readouterr().out.replace("(+30.0%)", "+30.0%")
    assert main(["bench", "--compare", *map(str, paths), "--band", "40"]) == 0


def test_ratio_and_closing_line():
    assert report.ratio_of({"fused": {"time": 2.0}, "eager": {"time": 8.0}, "compile": {"time": 4.0}}) == 0.5
    assert report.ratio_of({"fused": {"time": 2.0}, "eager": {}}) is None
    rows = [{"ratio": r, "providers": {}} for r in (0.5, 2.0, None)]
    assert report.closing_line(rows) == (
        "3 rows, 0 wrong results; fused / best other: geometric mean 1.000, slower in 1 of 2 rows"
    )


def test_quantiles():
    timing = measure.summarize([float(v) for v in range(1, 12)])
    assert (timing.median, timing.low, timing.high, timing.samples) == (6, 3, 9, 11)
    assert timing.best == 6
    assert measure.summarize([3.0], graph=1.0).best == 1.0


def test_plots_are_written(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["bench", *SMALL, "--plot", str(tmp_path / "plots")]) == 0
    for name in ("roofline.png", "squeeze_excite.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_list_names_every_op(capsys):
    assert main(["bench", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(op in printed for op in bench.OPS)
    assert main(["bench", "--list", "--shapes", "blink", "whiten"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1].split("x")[0] for line in lines] == ["2000", "2000"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["conv"], "unknown op 'conv'"),
        (["--json", "."], "is a folder; name a file"),
        (["--shapes", "1x2x3"], f"expected {', '.join(bench.NAMED)}, sweep or BxCxHxW"),
        (["--shapes", "1x4x0x3"], "expected network, blink, hlb, hlb-3x3, air, efficientnet_b0"),
        (["--shapes", "1x4x1x3"], "at least 2"),
        (["--list", "--shapes", "blink", "se_gate"], "--shapes blink has no case of se_gate"),
        (["--dtype", "float8"], "unknown 'float8'"),
        (["--providers", "jax"], "unknown 'jax'"),
        (["--json", "/proc/at/all.json"], "could not make the folder"),
        (["--compare", "missing.json", "missing.json"], "not a file that bench --json wrote"),
        (["--pass", "sideways"], "invalid choice"),
    ],
)
def test_mistakes_get_one_line(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.splitlines()) == 1
