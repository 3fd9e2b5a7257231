"""What torchvision and torch.optim offer beside the fused ops in the benchmark: the same numbers, or not shown."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torchvision.ops import SqueezeExcitation

from blink.__main__ import main
from blink.command import python_path
from blink.kernels import reference
from blink.kernels.examine import cases
from blink.kernels.examine.bench import providers


def changes(case, bind, tensors, steps):
    """What that many calls change each updated tensor by, in float64."""
    own = providers.fresh(case, tensors)
    bound = bind(case, own, torch.float32)
    for _ in range(steps):
        bound.call()
    return {
        name: value.double() - before.double()
        for buffer in case.buffers
        for (name, value), before in zip(cases.named(buffer, own[buffer]).items(), tensors[buffer])
    }


def furthest(found, wanted):
    assert found.keys() == wanted.keys()
    return max((found[name] - want).abs().max().item() / want.abs().max().item() for name, want in wanted.items())


LISTS = [(12, 3, 3, 3), (7, 5), (9,), (20, 12, 1, 1)]
# a momentum at which Nesterov's differs from plain
AS_TORCHS = dict(momentum=0.6, weight_decay=0.1, renormalize=False, averaged=True, shape_factor="original", steps=5)
OTHERS = [
    ("torchvision", cases.squeeze_excite(3, 20, 4, 5, 5, activation="silu")),
    ("torchvision", cases.squeeze_excite(3, 20, 4, 5, 5, gate_activation="hardsigmoid")),
    ("optim-foreach", cases.sgd_nesterov(LISTS)),
    ("optim-foreach", cases.sgd_nesterov(LISTS, rates=True, nesterov=False)),
    ("optim-fused", cases.sgd_nesterov(LISTS, rates=True)),
    ("optim-muon", cases.muon([shape for shape in LISTS if len(shape) > 1], **AS_TORCHS)),
]


@pytest.mark.parametrize("name, case", OTHERS, ids=lambda value: getattr(value, "label", value))
def test_public_modules_compute_what_the_ops_do(name, case):
    dtype = torch.bfloat16 if name == "optim-muon" else torch.float32
    tensors = case.make(torch.device("cpu"), dtype)
    verdict = providers.judge(
        case, providers.load(name, case, dtype), tensors, dtype, providers.truth_of(case, tensors)
    )
    assert verdict.right, verdict


@pytest.mark.parametrize("name, case", OTHERS[2:], ids=lambda value: getattr(value, "label", value))
def test_public_optimizers_keep_their_state(name, case):
    """Two steps change weights and momenta as the op's do; another Nesterov is noticed."""
    tensors = case.make(torch.device("cpu"), torch.float32)
    bind = providers.load(name, case, torch.bfloat16)
    found, eager = changes(case, bind, tensors, 2), providers.functions(reference)
    # torch.optim.Muon multiplies in bfloat16
    tolerance = providers.TOLERANCES[torch.bfloat16 if name == "optim-muon" else torch.float32]
    assert furthest(found, changes(case, eager, tensors, 2)) < tolerance
    other = replace(case, options={**case.options, "nesterov": not case.all_options["nesterov"]})
    assert furthest(found, changes(other, eager, tensors, 2)) > tolerance
    assert furthest(found, changes(case, eager, tensors, 1)) > tolerance


@pytest.mark.parametrize(
    "options, dtype, reason",
    [
        ({}, torch.float16, "never renormalizes"),
        (AS_TORCHS | {"averaged": False}, torch.float16, "averages gradients"),
        (AS_TORCHS | {"shape_factor": None}, torch.float16, "scales by shape"),
        (AS_TORCHS, torch.float32, "too coarse"),
    ],
)
def test_muon_of_torch_is_shown_only_where_it_is_the_same(options, dtype, reason):
    with pytest.raises(RuntimeError, match=reason):
        providers.load("optim-muon", cases.muon([(7, 5)], **options), dtype)


@pytest.mark.parametrize(
    "op, provider, owner, method",
    [
        ("squeeze_excite", "torchvision", SqueezeExcitation, "_scale"),
        ("sgd_nesterov", "optim-foreach", torch.optim.SGD, "_init_group"),
    ],
)
def test_a_wrong_public_module_gets_no_time(op, provider, owner, method, monkeypatch, capsys, tmp_path):
    own = getattr(owner, method)

    def scale(self, x):
        return own(self, x) * 1.01

    def init_group(self, group, *lists):
        group["momentum"] *= 1.01
        return own(self, group, *lists)

    monkeypatch.setattr(owner, method, {"_scale": scale, "_init_group": init_group}[method])
    out = tmp_path / "out.json"
    arguments = [op, "--shapes", "2x4x3x5", "--providers", f"{provider},eager", "--dtype", "float32", "--quick"]
    assert main(["bench", *arguments, "--json", str(out)]) == 1
    assert "WRONG" in capsys.readouterr().out
    for row in json.loads(out.read_text())["rows"]:
        assert {name: p["status"] for name, p in row["providers"].items()} == {provider: "wrong", "eager": "timed"}


def test_a_provider_without_the_op_is_absent(capsys, tmp_path):
    out = tmp_path / "out.json"
    assert main(["bench", "norm_act", "--shapes", "2x4x3x5", "--providers", "eager,torchvision,optim-fused", "--quick",
                 "--dtype", "float32", "--json", str(out)]) == 0  # fmt: skip
    assert [list(row["providers"]) for row in json.loads(out.read_text())["rows"]] == [["eager"]] * 2


def test_torchvision_is_needed_only_where_it_is_named(monkeypatch, capsys):
    code = """import sys; from blink.__main__ import main
assert main(['bench', '--list', '--shapes', '2x4x3x5']) == 0 and 'torchvision' not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": python_path()}, check=True)
    cases.model_cases.cache_clear()
    for module in ("torchvision.models", "torchvision.ops"):
        monkeypatch.setitem(sys.modules, module, None)
    assert main(["bench", "--list", "--shapes", "resnet50"]) == 2
    assert "--shapes resnet50 needs torchvision" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="torchvision is not installed"):
        providers.load("torchvision", cases.squeeze_excite(2, 4, 3, 5, 2), torch.float32)
