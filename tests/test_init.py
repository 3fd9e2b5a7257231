"""`--init`: another run's weights to begin with."""

import pytest
import torch
from safetensors.torch import load_file

from blink.training.loop import copied
from blink.training.trainer import Trainer
from tests.test_train_cli import QUICK, inside, make_tree, refused


@pytest.fixture
def seen(monkeypatch):
    """The weights that each run begins its steps with."""
    begun, whiten = [], Trainer.whiten

    def look(trainer):
        whiten(trainer)
        begun.append(copied(trainer.network))

    monkeypatch.setattr(Trainer, "whiten", look)
    return begun


@pytest.fixture
def trained(tmp_path, monkeypatch, capsys):
    """(the file of a run, the folder that it was trained on)"""
    monkeypatch.setenv("BLINK_CACHE", str(tmp_path / "cache"))
    tree = make_tree(tmp_path / "tree")
    code, *_ = inside(capsys, "--data", tree, *QUICK, "--out", tmp_path / "out")
    assert code == 0
    return tmp_path / "out" / "hlb-seed0.safetensors", tree


def test_a_run_begins_with_them(trained, seen, capsys):
    file, tree = trained
    code, out, _ = inside(
        capsys, "--data", tree, *QUICK, "--init", file, "--seed", "5", "--set", "network.norm_momentum=0.5"
    )
    assert code == 0 and "its head included" in "".join(out.split("\n"))
    want = load_file(file)
    assert seen[0].keys() == want.keys()
    for name, value in seen[0].items():
        assert torch.equal(value, want[name]), name


def test_other_classes_get_a_new_head(trained, seen, capsys, tmp_path):
    file, _ = trained
    other = make_tree(tmp_path / "other", size=20, classes=3)
    code, out, _ = inside(capsys, "--data", other, *QUICK, "--init", file)
    assert code == 0 and "other classes, so the head is new" in " ".join(out.split())
    want = load_file(file)
    assert seen[0]["head.weight"].shape[0] == 3 and want["head.weight"].shape[0] == 4
    for name in want.keys() - {"head.weight"}:
        assert torch.equal(seen[0][name], want[name]), name


def test_the_same_classes_in_another_order(trained):
    from blink.training.data.dataset import assemble
    from blink.training.initial import initial_weights
    from blink.training.recipes import HLB

    file, _ = trained
    pixels = torch.zeros(4, 12, 12, 3, dtype=torch.uint8).numpy()
    labels = torch.arange(4).numpy()
    dataset = assemble("shuffled", ("c", "a", "d", "b"), pixels, labels, pixels, labels)
    state, _ = initial_weights(file, HLB, dataset)
    assert torch.equal(state["head.weight"], load_file(file)["head.weight"][[2, 0, 3, 1]])


def test_other_networks_and_files_are_one_line(trained, capsys, tmp_path):
    file, tree = trained
    words = ["--data", tree, *QUICK]
    err = refused(capsys, *words, "--init", file, "--se", "8")
    assert "its network differs from recipe hlb in se_reduction; name the recipe that it was trained with (hlb)" in err
    assert "there is no" in refused(capsys, *words, "--init", tmp_path / "nothing.safetensors")
    (tmp_path / "text").write_text("text")
    assert "is no saved network" in refused(capsys, *words, "--init", tmp_path / "text")
