"""train.py with the fused kernels and with plain PyTorch, same seed: the same training."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from blink.__main__ import main
from blink.model import backend
from blink.model.network import Group
from blink.training import data, precision
from blink.training.budget import plan_budget
from blink.training.data import synthetic
from blink.training.data.dataset import assemble
from blink.training.loop import train
from blink.training.recipes import AIR, HLB, RECIPES, ParamGroup
from blink.training.trainer import Trainer, build_network
from tests.oracle import DEVICE
from tests.test_training_step import PHASED


@pytest.mark.parametrize(
    ("recipe", "rate", "narrowing"), [("hlb", 10, 16), ("air", 4, 16), ("blink", 4, 16), ("phased", 4, 8)]
)
def test_losses_agree_and_weights_move(image_folder, tmp_path, monkeypatch, recipe, rate, narrowing):
    """Per-image losses to 1e-4 relative at every step, with weights that moved by more than 1e-3 relative."""
    monkeypatch.setitem(RECIPES, PHASED.name, PHASED)
    # so few steps have no warm-up, and at the recipe's rate on tiny batches each multiplies any rounding by hundreds
    full = RECIPES[recipe]
    gentle = tuple(replace(group, lr=group.lr / rate) for group in full.param_groups)
    # narrow, because the interpreter is slow
    narrow = tuple(replace(group, channels=group.channels // narrowing) for group in full.network.conv_groups)
    network = replace(full.network, conv_groups=narrow, se_reduction=full.network.se_reduction and 4)
    monkeypatch.setitem(RECIPES, recipe, replace(full, param_groups=gentle, network=network))
    losses, weights = {}, {}
    for kernels in ("fused", "reference"):
        out = tmp_path / kernels
        words = ["--recipe", recipe, "--data", str(image_folder), "--device", DEVICE.type, "--dtype", "fp32"]
        words += ["--kernels", kernels, "--steps", "2", "--batch-size", "8", "--seed", "3"]
        words += ["--validate", "0", "--limit", "8"]
        assert main(["train", *words, "--out", str(out)]) == 0
        summary = json.loads((out / "summary.json").read_text())
        assert summary["kernels"]["name"] == kernels
        losses[kernels] = summary["runs"][0]["losses"]
        weights[kernels] = load_file(out / f"{recipe}-seed3.safetensors")
    assert len(losses["fused"]) == 2
    for ours, theirs in zip(losses["fused"], losses["reference"]):
        assert abs(ours - theirs) <= 1e-4 * abs(theirs)
    dataset = data.load(str(image_folder), lambda done, total: None, lambda note: None)
    start = build_network(RECIPES[recipe], dataset, backend.reference(), precision.choose("fp32", DEVICE, False), 3)
    for name, before in start.state_dict().items():
        if ".conv" in name:
            moved = weights["fused"][name] - before
            assert moved.norm() > 1e-3 * before.norm(), name
            difference = weights["fused"][name] - weights["reference"][name]
            assert difference.norm() < 0.05 * moved.norm(), name
    assert all(torch.isfinite(value).all() for value in weights["fused"].values())


def test_fused_kernels_learn_what_the_reference_learns():
    """A tiny network with every op on 12 images, which both backends begin to fit, step for step alike."""
    images, labels, *_ = synthetic.generate(12, 8)
    crop = images[:, 12:20, 12:20]
    dataset = assemble("generated", synthetic.CLASSES, crop, labels, crop, labels, generated=True).to(DEVICE)
    groups = (Group(8, depth=1), Group(16, residual=False))
    network = replace(
        HLB.network, stem_channels=8, conv_groups=groups, se_reduction=4, norm_momentum=0.5, logit_scale=1.0
    )
    recipe = replace(
        AIR,
        network=network,
        param_groups=(
            ParamGroup("biases", "sgd", 0.02, 0.85),
            ParamGroup("filters", "muon", 0.1, 0.6),
            ParamGroup("weights", "sgd", 0.02, 0.85),
        ),
        flip="none",
        translation=0,
        label_smoothing=0.0,
        tta="mirror",
    )
    budget, compute = plan_budget(recipe, len(images), 6, steps=9), precision.choose("fp32", DEVICE, True)
    fused, plain = (
        train(Trainer(recipe, dataset, budget, which, compute, graph=False), 0, validate=0)
        for which in (backend.fused(), backend.reference())
    )
    for result in (fused, plain):
        assert sum(result.losses[-3:]) < 0.85 * sum(result.losses[:3]) and result.accuracy >= 0.3
    for ours, theirs in zip(fused.losses, plain.losses):
        assert abs(ours - theirs) <= 0.1 * theirs
    assert abs(fused.accuracy - plain.accuracy) <= 0.1
