"""The command `blink`: its help, its recipes, what every mistake looks like, and what a call imports."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import blink
from blink import __version__
from blink.__main__ import COMMANDS, main
from blink.errors import UserError
from blink.training.recipes import RECIPES, Recipe

ROOT = Path(__file__).resolve().parent.parent


def test_help_names_every_command(capsys):
    for arguments in ([], ["--help"]):
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        assert all(f"\n  {name} " in printed for name in COMMANDS)
        assert all(len(line) <= 80 for line in printed.splitlines())
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"blink {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_commands_help_fits_80_columns_and_shows_two_examples(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and all(len(line) <= 80 for line in printed.splitlines())
    examples = printed.partition("examples:\n")[2].splitlines()
    assert len(examples) == 2 and all(line.startswith(f"  blink {name}") for line in examples)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistake_is_one_line_with_one_prefix(name, capsys):
    assert main([name, "--no-such-flag"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("blink: ") and printed.err.count("\n") == 1


def test_an_unknown_command_is_one_line(capsys):
    assert main(["trian"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("blink: unknown command 'trian'; expected one of train, ") and err.count("\n") == 1


def test_help_imports_nothing_heavy():
    code = "import sys; from blink.__main__ import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    modules = done.stdout.splitlines()[-1].split()
    assert "blink.command" in modules and not {"torch", "numpy", "rich", "triton"} & set(modules)


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} -m blink recipes hlb | head -n 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("hlb: ") and done.stderr == ""


def test_train_as_a_function(tmp_path, capsys):
    options = dict(recipe="hlb", data="synthetic", limit=32, steps=1, batch_size=8, device="cpu", dtype="fp32", seed=4)
    first, second = blink.train(**options, runs=2, deterministic=True, validate=0, json=tmp_path / "runs.json")
    assert (first.seed, second.seed) == (4, 5) and 0 <= first.accuracy <= 1 and len(first.losses) == 1
    assert first.state["head.weight"].shape[0] == 10
    assert len(json.loads((tmp_path / "runs.json").read_text())["runs"]) == 2
    assert capsys.readouterr() == ("", "")
    with pytest.raises(UserError, match="expected a whole number above 0"):
        blink.train(steps=0)


def test_recipes_are_listed_and_shown(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == list(RECIPES) and lines[0].startswith("blink ")
    assert max(map(len, lines)) <= 80
    assert main(["recipes", "hlb"]) == 0
    shown = capsys.readouterr().out
    for field in fields(Recipe):
        assert field.name in ("name", "summary") or f"\n  {field.name}" in shown, field.name
    assert "  network.se_reduction = 16\n" in shown
