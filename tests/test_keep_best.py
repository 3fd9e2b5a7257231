"""`--keep best`: the weights of the epoch that did best in validation, and what they come to."""

import json

import pytest
import torch
from safetensors.torch import load_file

import blink
from blink.training import loop
from blink.training.listener import Listener
from blink.training.loop import copied
from tests.test_api import pixels


@pytest.mark.parametrize(
    "recipe, found, best",
    [
        ("blink", [(0.5, None), (0.9, None), (0.2, None)], 2),
        ("blink", [(0.5, None), (0.5, None), (0.2, None)], 2),
        ("blink", [(0.1, None), (0.2, None), (0.3, None)], None),
        # once there is an average, it is what counts
        ("hlb", [(0.3, None), (0.1, 0.8), (0.9, 0.4)], 2),
        ("hlb", [(0.7, None), (0.9, 0.5), (0.9, 0.6)], 1),
    ],
)
def test_the_best_epochs_weights_are_kept(tmp_path, monkeypatch, recipe, found, best):
    answers, weights = list(found), []
    trainers = []

    def validated(trainer, limit):
        trainers[:] = [trainer]
        return answers.pop(0)

    def remember(row):
        averaged = row.ema_accuracy is not None
        if averaged:
            with trainers[0].final_weights():
                weights.append(copied(trainers[0].network))
        else:
            weights.append(copied(trainers[0].network))

    monkeypatch.setattr(loop, "validated", validated)
    settings = {"ema_fraction": 0.99} if recipe == "hlb" else {}
    result = blink.train(
        (*pixels(24), *pixels(20)), recipe, epochs=3, batch_size=8, device="cpu", dtype="fp32", keep="best",
        out=tmp_path / "out", callbacks=[Listener(on_epoch=remember)], settings=settings,
    )  # fmt: skip
    (run,) = result
    kept = load_file(tmp_path / "out" / f"{recipe}-seed0.safetensors")
    want = weights[-1 if best is None else best - 1]
    for name, value in want.items():
        assert torch.equal(kept[name], value), name
    facts = blink.load(tmp_path / "out" / f"{recipe}-seed0.safetensors", device="cpu").facts
    if best is None:
        assert run.kept is None and facts["epoch"] == 3 and facts["accuracy"] == run.accuracy
        return
    assert run.kept.epoch == best == facts["epoch"] and facts["accuracy"] == run.kept.accuracy
    right = (run.logits.argmax(1) == torch.from_numpy(pixels(20)[1])[run_order(20)]).double().mean().item()
    assert run.kept.accuracy == right
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["runs"][0]["kept"]["epoch"] == best


def run_order(count):
    from blink.training.data.dataset import fixed_order

    return torch.from_numpy(fixed_order(count))
