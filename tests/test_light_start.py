"""Help and mistakes on the command line end without PyTorch and other slow libraries, and the names that this takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from blink.__main__ import COMMANDS
from blink.experiments.commands import bench as bench_arguments
from blink.experiments.commands import known
from blink.kernels import reference, registry
from blink.kernels.examine import cases
from blink.kernels.examine.bench import command as bench
from blink.kernels.examine.bench import providers
from blink.model import config
from blink.training import arguments, data, precision

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "torchvision", "triton", "numpy", "matplotlib", "pyarrow")
# of arguments that argparse refuses, one a command beside an unknown option
MISTAKES = {
    "train": ["--kernels", "fastest"],
    "recipes": ["blink", "hlb"],
    "until": ["1.5"],
    "predict": ["model.safetensors"],
    "evaluate": ["model.safetensors", "--data", "x", "--half", "third"],
    "export": [],
    "report": [],
    "plot": [],
    "ablate": ["--shard", "9/8"],
    "merge": [],
    "race": ["hiverge=x", "--recipe", "nonsense"],
    "tabulate": ["--root"],
    "profile": ["--dtype", "int8"],
    "bench": ["softmax"],
    "inspect": ["--bounds", "Z80"],
}
_CALL = """
import contextlib, io, json, sys
from blink.__main__ import main
found = []
for words in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code
    found.append([code, said.getvalue(), sorted(set(json.loads(sys.argv[2])) & set(sys.modules))])
print(json.dumps(found))
"""


def called(calls: list[list[str]]) -> list[tuple[int, str, list[str]]]:
    """(exit code, what was said, which of HEAVY there are by then) of each call, all in one new process."""
    command = [sys.executable, "-c", _CALL, json.dumps(calls), json.dumps(HEAVY)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_help_and_mistakes_import_nothing_heavy():
    assert MISTAKES.keys() == COMMANDS.keys()
    for kind, expected in (("--help", 0), ("--no-such-flag", 2), (None, 2)):
        calls = [[name, *(MISTAKES[name] if kind is None else [kind])] for name in COMMANDS]
        for words, (code, said, heavy) in zip(calls, called(calls)):
            assert (code, heavy) == (expected, []), (words, code, said, heavy)
            assert kind == "--help" or (said.startswith("blink: ") and said.count("\n") == 1), (words, said)


def test_names_of_arguments_are_those_of_the_tables():
    assert tuple(reference.ACTIVATIONS) == config.ACTIVATIONS
    assert tuple(precision.DTYPES) == arguments.DTYPES
    assert data.NAMES == arguments.DATA_SETS
    assert tuple(bench.DTYPES) == bench_arguments.DTYPES
    assert tuple(cases.MODELS) == known.MODELS
    assert tuple(providers.PROVIDERS) == known.PROVIDERS
    assert sorted(reference.OPS) == sorted(known.OPS)


def test_names_of_arguments_are_those_of_the_kernels():
    pytest.importorskip("triton")
    from blink.kernels.examine.ahead_of_time import TARGETS
    from blink.kernels.examine.bounds import GPUS

    assert set(registry.OPS) == set(known.OPS)
    assert tuple(TARGETS) == known.TARGETS
    assert tuple(GPUS) == known.GPUS


def test_what_is_not_there_is_said_before_pytorch_is_imported():
    calls = [
        *([name, "--recipe", "nonsense"] for name in ("train", "profile")),
        *([name, "--data", "nowhere/"] for name in ("train", "profile")),
        ["until", "0.9", "--recipe", "nowhere.py:MINE"],
        ["predict", "nowhere.safetensors", "image.png"],
        ["evaluate", "nowhere.safetensors", "--data", "synthetic"],
        ["export", "nowhere.safetensors", "--onnx", "model.onnx"],
        ["ablate", "nonsense"],
        ["ablate", "search", "--data", "nowhere/"],
        ["race", "hiverge=nowhere", "--data", "nowhere/"],
        ["report", "nowhere/"],
        ["plot", "nowhere.json"],
        ["merge", "nowhere.jsonl", "-o", "merged.jsonl"],
        ["recipes", "nonsense"],
    ]
    for words, (code, said, heavy) in zip(calls, called(calls)):
        assert (code, heavy) == (2, []) and ("nowhere" in said or "nonsense" in said), (words, code, said, heavy)


def test_what_needs_no_tensor_runs_without_pytorch():
    calls = [["recipes"], ["recipes", "hlb"], ["ablate"], ["tabulate", "--check"]]
    for words, (code, said, heavy) in zip(calls, called(calls)):
        # the t distribution of tables is scipy's, which needs numpy
        # 1: stale tables, which is another test's business
        assert code in (0, words[0] == "tabulate") and {*heavy} <= {"numpy"}, (words, code, said, heavy)
