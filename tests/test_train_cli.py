"""`blink train`, and train.py, from the command line: what it prints, writes and refuses."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from blink.__main__ import main
from blink.training.recipes import RECIPES

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["--recipe", "hlb", "--steps", "2", "--batch-size", "8", "--device", "cpu", "--dtype", "fp32"]


def make_tree(root, size=12, classes=4, images=8):
    random = np.random.RandomState(0)
    for half in ("train", "test"):
        for name in "abcdefgh"[:classes]:
            folder = root / half / name
            folder.mkdir(parents=True)
            for i in range(images):
                pixels = random.randint(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return str(root)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def tree(shared):
    return make_tree(shared / "tree")


@pytest.fixture(autouse=True)
def _own_cache_and_settings(shared, monkeypatch):
    monkeypatch.setenv("BLINK_CACHE", str(shared / "cache"))
    monkeypatch.delenv("COLUMNS", raising=False)
    cudnn = torch.backends.cudnn
    kept = cudnn.deterministic, cudnn.benchmark
    yield
    cudnn.deterministic, cudnn.benchmark = kept


def process(shared, *arguments):
    """Run train.py as its own process; `words` of the result is its output with line breaks ignored."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "COLUMNS", "FORCE_COLOR")}
    env |= {"OMP_NUM_THREADS": "1", "BLINK_CACHE": str(shared / "cache")}
    command = [sys.executable, "train.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert "Traceback" not in done.stderr + done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    done.words = " ".join(done.stdout.split())
    return done


def inside(capsys, *arguments):
    """Run `blink train` here; returns (exit code, standard output, standard error)."""
    code = main(["train", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def two_runs(shared, tree):
    """One process that most of the following tests look at."""
    out = shared / "out"
    arguments = ["--data", tree, *QUICK, "--deterministic", "--seed", "5", "--runs", "2"]
    arguments += ["--json", shared / "new" / "two.json", "--out", out]
    done = process(shared, *arguments)
    assert done.returncode == 0, done.stderr
    return done, json.loads((shared / "new" / "two.json").read_text()), out


def test_json_of_a_run(two_runs):
    _, content, out = two_runs
    assert [run["seed"] for run in content["runs"]] == [5, 6]
    for run in content["runs"]:
        assert 0 <= run["accuracy"] <= 1 and run["seconds"] > 0 and run["images_per_second"] > 0
        assert len(run["losses"]) == 2 and run["logged_steps"] == [0, 1]
        assert np.isfinite(run["losses"]).all()
        assert [row["step"] for row in run["epochs"]] == [2]
    accuracies = [run["accuracy"] for run in content["runs"]]
    assert content["summary"]["accuracy"]["mean"] == pytest.approx(np.mean(accuracies))
    assert content["summary"]["accuracy"]["std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert content["summary"]["seconds"]["n"] == 2
    flops = content["flops"]
    parts = (flops[name] for name in ("whitening", "training", "optimizer", "evaluation"))
    assert flops["total"] == sum(parts) > 0 and flops["optimizer"] == 0
    data = content["data"]
    assert (data["train"], data["test"], data["classes"], data["image_shape"]) == (32, 32, 4, [3, 12, 12])
    assert data["generated"] is False and len(data["fingerprint"]) == 12
    assert content["command"][:2] == ["blink", "train"] and "--deterministic" in content["command"]
    assert content["deterministic"] is True and content["dtype"] == "fp32"
    assert content["kernels"]["name"] == "native"
    assert content["budget"] == {"batch_size": 8, "steps_per_epoch": 4, "total_steps": 2}
    assert list(content["start_up"]) == ["imports", "data", "network"] and min(content["start_up"].values()) > 0
    assert json.loads((out / "summary.json").read_text()) == content


def test_output_of_two_runs(two_runs):
    done, content, _ = two_runs
    assert done.stderr == ""
    for part in (
        "32 training and 32 test images, 12x12, 4 classes",
        f"fingerprint {content['data']['fingerprint']}",
        "budget 2 steps of 8 images (1 epoch)",
        "run 1 of 2, seed 5",
        "run 2 of 2, seed 6",
        "95 % +-",
        "PFLOP a run",
        "n = 2",
    ):
        assert part in done.words
    assert f"accuracy {content['summary']['accuracy']['mean']:.4f} std" in done.words
    assert "NOT CIFAR-10" not in done.stdout


def test_weights_of_every_run_load(two_runs):
    *_, out = two_runs
    assert sorted(p.name for p in out.iterdir()) == [
        *("hlb-seed5.gallery.safetensors", "hlb-seed5.safetensors"),
        *("hlb-seed6.gallery.safetensors", "hlb-seed6.safetensors"),
        "summary.json",
    ]
    first, second = (load_file(out / f"hlb-seed{seed}.safetensors") for seed in (5, 6))
    assert first["head.weight"].shape == (4, 512) and all(t.isfinite().all() for t in first.values())
    assert torch.equal(first["stem.whiten.weight"], second["stem.whiten.weight"])
    assert not torch.equal(first["head.weight"], second["head.weight"])


def test_deterministic_twice_gives_identical_losses_and_weights(shared, tree, two_runs):
    _, first, out = two_runs
    again = shared / "again"
    arguments = ["--data", tree, *QUICK, "--deterministic", "--seed", "5", "--out", again]
    done = process(shared, *arguments, "--json", shared / "again.json")
    assert done.returncode == 0, done.stderr
    second = json.loads((shared / "again.json").read_text())
    assert second["runs"][0]["losses"] == first["runs"][0]["losses"]
    assert second["runs"][0]["losses"] != first["runs"][1]["losses"]
    assert second["data"]["fingerprint"] == first["data"]["fingerprint"]
    name = "hlb-seed5.safetensors"
    # tensor by tensor: safetensors orders a file's metadata at random
    weights, expected = load_file(again / name), load_file(out / name)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert second["summary"]["accuracy"]["std"] is None and "95 %" not in done.stdout


@pytest.mark.parametrize("recipe", ["hlb", "air"])
@pytest.mark.parametrize("stem", ["2x2", "3x3", "2x2-same", "3x3-same", "none"])
def test_every_stem_trains(shared, tree, capsys, stem, recipe):
    target = shared / f"{recipe}-{stem}.json"
    code, out, err = inside(capsys, "--data", tree, *QUICK, "--recipe", recipe, "--stem", stem, "--json", target)
    assert (code, err) == (0, "")
    plain = stem not in ("2x2", "3x3")
    words = " ".join(out.split())
    assert ("this stem runs the plain convolution" in words) == plain
    shown = "stem without whitening" if stem == "none" else "'same' stem as plain convolution"
    assert (shown in words.split("summary")[-1]) == plain
    network = json.loads(target.read_text())["recipe"]["network"]
    kernel = None if stem == "none" else int(stem[0])
    assert (network["whiten_kernel"], network["whiten_padding"]) == (kernel, "same" if plain else 0)


def test_air_says_what_its_accuracy_is_of(shared, tree, capsys):
    target = shared / "air.json"
    code, out, err = inside(capsys, "--data", tree, *QUICK, "--steps", "9", "--recipe", "air", "--json", target)
    assert (code, err) == (0, "")
    words = " ".join(out.split())
    assert "(mirrored and translated, 32 images)" in words and "EMA acc" not in words and "SE off" in words
    run = json.loads(target.read_text())["runs"][0]
    assert [row["ema_accuracy"] for row in run["epochs"]] == [None] * 3
    assert all(0 <= row["train_accuracy"] <= 1 for row in run["epochs"])


def test_blink_is_the_default_and_says_what_it_leaves_out(shared, tree, capsys):
    target = shared / "blink.json"
    options = ("--steps", "9", "--batch-size", "8", "--device", "cpu", "--dtype", "fp32", "--json", target)
    code, out, err = inside(capsys, "--data", tree, *options)
    assert (code, err) == (0, "")
    words = " ".join(out.split())
    assert "Blink: blink on" in words and "(3 epochs)" in words
    assert "(mirrored and translated where least sure, 32 images)" in words
    content = json.loads(target.read_text())
    assert content["budget"] == {"batch_size": 8, "steps_per_epoch": 4, "total_steps": 9}
    assert content["recipe"]["resolutions"] == [{"until": 0.4, "scale": 0.75}]


def test_a_recipe_says_which_part_of_the_images_an_epoch_takes(tree, capsys, monkeypatch):
    monkeypatch.setitem(RECIPES, "blink", replace(RECIPES["blink"], keep=0.8))
    options = ("--steps", "9", "--batch-size", "8", "--device", "cpu", "--dtype", "fp32")
    code, out, err = inside(capsys, "--data", tree, *options)
    assert (code, err) == (0, "") and "(3 epochs of 80% of them)" in " ".join(out.split())


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-3), ("bf16", 1e-2)])
def test_compiled_reference_trains_as_eager_does(shared, tree, capsys, monkeypatch, dtype, tolerance):
    """In bf16 too, where compiled code rounds what it keeps and not what it computes again."""
    # one group of convolutions: the compiler's time grows with them
    network = RECIPES["air"].network
    network = replace(network, conv_groups=network.conv_groups[:1])
    monkeypatch.setitem(RECIPES, "air", replace(RECIPES["air"], network=network))
    losses, start_up = {}, {}
    for kernels in ("compiled", "reference"):
        target = shared / f"{kernels}-{dtype}.json"
        options = ("--recipe", "air", "--kernels", kernels, "--json", target, "--dtype", dtype)
        # the compiler may have something to say on standard error
        code, _, _ = inside(capsys, "--data", tree, *QUICK, *options)
        assert code == 0
        content = json.loads(target.read_text())
        losses[kernels], start_up[kernels] = content["runs"][0]["losses"], content["start_up"]
    assert losses["compiled"] == pytest.approx(losses["reference"], rel=tolerance)
    # what compiles does so before the run that is timed
    assert set(start_up["compiled"]) - set(start_up["reference"]) == {"warm-up"}


def test_a_recipes_settings_are_set(shared, tree, capsys):
    target, out_folder = shared / "set.json", shared / "set"
    options = ("--flip", "none", "--set", "translation=1", "--set", "network.conv_groups.2.channels=64")
    code, out, err = inside(capsys, "--data", tree, *QUICK, *options, "--json", target, "--out", out_folder)
    assert (code, err) == (0, "") and "(EMA, not augmented," in " ".join(out.split())
    recipe = json.loads(target.read_text())["recipe"]
    assert (recipe["flip"], recipe["tta"], recipe["translation"]) == ("none", None, 1)
    assert load_file(out_folder / "hlb-seed0.safetensors")["head.weight"].shape[1] == 64
    assert "blink recipes hlb lists all" in refused(capsys, "--data", tree, *QUICK, "--set", "translation=far")


def test_compiled_needs_a_compiler(capsys, monkeypatch, tree):
    monkeypatch.setenv("CXX", "no-such-compiler")
    err = refused(capsys, "--data", tree, *QUICK, "--kernels", "compiled")
    assert "needs a C++ compiler" in err and "--kernels reference" in err


def test_graph_needs_a_gpu(capsys, tree):
    assert "--graph on needs a GPU" in refused(capsys, "--data", tree, *QUICK, "--graph", "on")


@pytest.mark.parametrize(("option", "shown"), [("off", "SE off"), ("4", "SE /4")])
def test_squeeze_and_excite_option_trains(shared, tree, capsys, option, shown):
    out_folder = shared / f"se-{option}"
    code, out, err = inside(capsys, "--data", tree, *QUICK, "--se", option, "--out", out_folder)
    assert (code, err) == (0, "")
    assert shown in " ".join(out.split())
    weights = load_file(out_folder / "hlb-seed0.safetensors")
    if option == "off":
        assert not any(".se." in name for name in weights)
    else:
        assert weights["groups.0.se.fc1.weight"].shape == (32, 128)


def test_generated_set_says_so_first_last_and_in_the_json(shared):
    target = shared / "generated.json"
    arguments = ["--data", "synthetic", "--limit", "64", "--steps", "1", "--device", "cpu", "--dtype", "fp32"]
    done = process(shared, *arguments, "--json", target)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("NOT CIFAR-10")
    summary = done.words.split("summary", 1)[1]
    assert "NOT CIFAR-10" in summary and "fingerprint" in summary
    content = json.loads(target.read_text())
    assert content["data"]["generated"] is True
    assert (content["data"]["train"], content["data"]["test"]) == (64, 64)
    assert len(content["runs"][0]["losses"]) == 1


def test_bad_path_as_a_process(shared):
    done = process(shared, "--data", shared / "nowhere", "--device", "cpu")
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "there is no" in done.stderr


def test_fused_kernels_on_the_cpu_need_the_interpreter(shared, tree):
    done = process(shared, "--data", tree, *QUICK, "--kernels", "fused")
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "TRITON_INTERPRET" in done.stderr


def refused(capsys, *arguments):
    """The one line on standard error of arguments that must be refused."""
    code, out, err = inside(capsys, *arguments)
    assert code == 2
    assert err.startswith("blink: ") and err.endswith("\n") and err.count("\n") == 1
    assert "Traceback" not in out + err
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "1.5"], "expected a whole number above 0"),
        (["--epochs", "0"], "above 0"),
        (["--epochs", "nan"], "above 0"),
        (["--epochs", "inf"], "above 0"),
        (["--epochs", "many"], "above 0"),
        (["--steps", "0"], "above 0"),
        (["--steps", "3", "--epochs", "2"], "--steps and --epochs"),
        (["--batch-size", "-1"], "above 0"),
        (["--runs", "0"], "above 0"),
        (["--limit", "0"], "above 0"),
        (["--se", "0"], "above 0"),
        (["--se", "on"], "above 0"),
        (["--seed", "-1"], "expected 0, 1, 2"),
        (["--seed", str(2**63)], "expected 0, 1, 2"),
        (["--validate", "-1"], "expected 0, 1, 2"),
        (["--recipe", "none"], "unknown recipe 'none'"),
        (["--stem", "4x4"], "invalid choice"),
        (["--dtype", "int8"], "invalid choice"),
        (["--kernels", "slow"], "invalid choice"),
        (["--step", "1"], "unrecognized"),
        (["--data"], "expected one argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_one_line(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99"])
def test_bad_device_is_one_line(capsys, tree, device):
    assert f"--device {device}" in refused(capsys, "--data", tree, "--device", device)


def test_images_too_small_are_refused(capsys, tmp_path):
    err = refused(capsys, "--data", make_tree(tmp_path / "small", size=8, images=2), *QUICK)
    assert "8x8 are too small" in err and "at least 9x9" in err


def test_single_class_is_refused(capsys, tmp_path):
    err = refused(capsys, "--data", make_tree(tmp_path / "one", classes=1), *QUICK)
    assert "at least 2 classes" in err


def test_one_image_batches_need_more_than_one_position(capsys, tmp_path, tree):
    for options in (["--batch-size", "1"], ["--limit", "1"]):
        err = refused(capsys, "--data", tree, *QUICK, *options)
        assert "1 image of 12x12" in err and "--batch-size 2" in err
    larger = make_tree(tmp_path / "larger", size=17, classes=2, images=1)
    code, out, err = inside(capsys, "--data", larger, *QUICK, "--batch-size", "1")
    assert (code, err) == (0, "") and "steps of 1 images" in out


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_other_dtypes_train_on_the_cpu(capsys, tmp_path, tree, dtype):
    code, _, err = inside(capsys, "--data", tree, *QUICK, "--dtype", dtype, "--json", tmp_path / "x.json")
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "x.json").read_text())["dtype"] == dtype


def test_validation_limit_and_several_epochs(capsys, tmp_path, tree):
    target = tmp_path / "x.json"
    code, _, err = inside(capsys, "--data", tree, *QUICK, "--steps", "9", "--validate", "0", "--json", target)
    assert (code, err) == (0, "")
    content = json.loads(target.read_text())
    assert [row["step"] for row in content["runs"][0]["epochs"]] == [4, 8, 9]
    assert all(row["accuracy"] is None for row in content["runs"][0]["epochs"])
    assert len(content["runs"][0]["losses"]) == 9
