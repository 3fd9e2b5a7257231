"""Random flags and environments at every command: exit code 0 or 2, after one line on standard error, and no traceback.

BLINK_FUZZ_EXAMPLES=5000 pytest tests/test_random_flags.py tries more of them.
"""

import contextlib
import io
import os
import tempfile
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from blink.__main__ import COMMANDS, main
from blink.training import show_recipes
from blink.training.recipes import RECIPES

EXAMPLES = int(os.environ.get("BLINK_FUZZ_EXAMPLES", "40"))
ODD = ["", "x", "-", "-1", "0", "1e400", "nan", "99999999999999999999", "/proc/x", "a\nb", "\udcff", "é"]
# what a flag may be given beside ODD; a list: one of these, none of them at all: the flag takes no value
TRAIN = {
    "--epochs": ["0.1", "1"],
    "--steps": ["1", "2"],
    "--runs": ["1", "2"],
    "--validate": ["0", "3"],
    "--recipe": ["blink", "hlb", "air", "hlb-3x3", "none", "mine.py:MINE"],
    "--size": ["3", "12", "16"],
    "--val-split": ["0.5", "1"],
    "--limit": ["1", "2", "40"],
    "--stem": ["2x2", "3x3", "2x2-same", "3x3-same", "none"],
    "--se": ["off", "4", "9999"],
    "--flip": ["none", "random", "alternating"],
    "--set": [
        "translation=9",
        "translation=x",
        "keep=0.01",
        "network.conv_groups=()",
        "tta=None",
        "jitter=(1,1)",
        "a.b=c",
    ],
    "--batch-size": ["1", "2", "8", "4000"],
    "--micro-batch": ["1", "3", "8"],
    "--seed": ["3"],
    "--kernels": ["auto", "native", "reference"],
    "--graph": ["auto", "on", "off"],
    "--device": ["cpu", "cuda", "meta", "mps", "cuda:99"],
    "--dtype": ["fp32", "bf16", "fp16"],
    "--deterministic": [],
    "--out": ["out", "file"],
    "--keep": ["best", "last"],
    "--checkpoint-every": ["0", "1", "5"],
    "--overwrite": [],
    "--json": ["x.json", "out", "-"],
    "--csv": ["x.csv", "out"],
    "--init": ["file", "nothing"],
    "--resume": ["out", "file", "nothing"],
}
OTHERS = {
    "recipes": {},
    "until": {key: TRAIN[key] for key in ("--epochs", "--recipe", "--limit", "--set", "--json", "--device")},
    "predict": {"--top": ["1", "99"], "--device": ["cpu", "cuda"], "--json": [], "--csv": []},
    "ablate": {"--only": ["x"], "--width": ["0.1"], "--minutes": ["0.001"], "--json": ["file", "x.jsonl"]},
    "race": {"--runs": ["1"], "--blocks": ["1"], "--scratch": ["file"]},
    "tabulate": {"--out": ["file"]},
    "profile": {"--recipe": ["none"], "--json": ["out"], "--traces": ["file"]},
    "bench": {"--dtype": ["fp7"], "--shapes": ["none"], "--json": ["out"]},
    "inspect": {"--target": ["sm_1"], "--dtype": ["float7"], "--json": ["out"]},
}
ENVIRONMENTS = {
    "BLINK_CACHE": ["cache", "file", "/proc/x"],
    "COLUMNS": ["1", "80", "x"],
    "TERM": ["dumb", "xterm-256color"],
    "NO_COLOR": ["1"],
    "FORCE_COLOR": ["1"],
    "HOME": ["/nonexistent"],
}


# every setting of two recipes, at values that few of them take
SETTINGS = [
    f"{name}={value}"
    for recipe in (RECIPES["blink"], RECIPES["hlb"])
    for name in show_recipes.settings(asdict(recipe))
    for value in ("0", "-1", "0.5", "1e30", "None", "x", "nan", "1e400", "True", "()", "(0,0)", "1")
    # a run of which would take long, or no run's memory
    if not (name in ("epochs", "whiten_images") or (value == "1e30" and "channels" in name))
]
TRAIN["--set"] += SETTINGS


def words(flags: dict[str, list[str]]) -> st.SearchStrategy[list[str]]:
    def one(flag: str) -> st.SearchStrategy[list[str]]:
        if not flags[flag]:
            return st.just([flag])
        # most of the time something that can be meant
        value = st.one_of(st.sampled_from(flags[flag]), st.sampled_from(flags[flag]), st.sampled_from(ODD))
        return st.one_of(value.map(lambda v: [f"{flag}={v}"]), value.map(lambda v: [flag, v]))

    if not flags:
        return st.just([])
    some = st.lists(st.sampled_from(sorted(flags)), max_size=6, unique=True)
    return some.flatmap(lambda chosen: st.tuples(*map(one, chosen))).map(lambda found: [*chain(*found)])


environments = st.fixed_dictionaries({}, optional={k: st.sampled_from(v) for k, v in ENVIRONMENTS.items()})


@contextlib.contextmanager
def somewhere(environment: dict[str, str]):
    """A folder of images, a file and nothing else, with this environment."""
    before, place = dict(os.environ), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        random = np.random.RandomState(0)
        for half in ("train", "test"):
            for name in "ab":
                (Path(folder) / "images" / half / name).mkdir(parents=True)
                for i in range(4):
                    pixels = random.randint(0, 256, (12, 12, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(Path(folder) / "images" / half / name / f"{i}.png")
        (Path(folder) / "file").write_text("text")
        os.chdir(folder)
        os.environ.update({"BLINK_CACHE": "cache", **environment})
        try:
            yield
        finally:
            os.chdir(place)
            os.environ.clear()
            os.environ.update(before)


def called(arguments: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """(exit code, standard error)"""
    out, err = io.StringIO(), io.StringIO()
    kept = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    with somewhere(environment), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
        finally:
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = kept
    return code, err.getvalue()


def check(arguments: list[str], environment: dict[str, str]) -> None:
    code, err = called(arguments, environment)
    said = (arguments, environment, code, err)
    assert code in (0, 2), said
    assert "Traceback" not in err, said
    if code == 2:
        assert sum(line.startswith("blink: ") for line in err.splitlines()) == 1, said


quick = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@quick
@given(flags=words(TRAIN), environment=environments)
def test_train(flags, environment):
    # what is not given is small
    small = ["--data", "images", "--steps", "1", "--batch-size", "4", "--device", "cpu", "--validate", "2"]
    given_ones = {word.partition("=")[0] for word in flags}
    if "--epochs" in given_ones:
        given_ones.add("--steps")
    rest = [w for flag, value in zip(small[::2], small[1::2]) if flag not in given_ones for w in (flag, value)]
    check(["train", *rest, *flags], environment)


def test_every_command_is_tried():
    assert {"train", *OTHERS} <= set(COMMANDS)


@quick
@given(name=st.sampled_from(sorted(OTHERS)), data=st.data(), environment=environments)
def test_other_commands(name, data, environment):
    flags = data.draw(words(OTHERS[name]))
    # none of which begins long work: a flag that is impossible, or a file that is not there, comes first
    wrong = {"until": ["2"], "predict": ["nothing", "file"], "recipes": [], "tabulate": ["nothing"]}
    check([name, *wrong.get(name, ["--nonsense"]), *flags], environment)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["nonsense"], ["-"], [""]])
def test_no_command(arguments):
    code, err = called(arguments, {})
    assert code in (0, 2) and err.count("\n") == (code == 2)


@quick
@given(setting=st.sampled_from(SETTINGS), recipe=st.sampled_from(["blink", "hlb"]))
def test_settings(setting, recipe):
    small = ["--data", "images", "--steps", "1", "--batch-size", "4", "--device", "cpu", "--dtype", "fp32"]
    check(["train", *small, "--validate", "2", "--recipe", recipe, "--set", setting], {})
