"""Out of memory, and batches that are taken in parts."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import blink
from blink.__main__ import main
from blink.errors import UserError, is_exhausted
from blink.model import backend
from blink.training import memory, precision
from blink.training.budget import plan_budget
from blink.training.loop import train
from blink.training.recipes import AIR, HLB
from blink.training.step import training_step
from blink.training.trainer import Trainer
from tests.oracle import DEVICE
from tests.processes import started
from tests.small import small_dataset
from tests.test_api import pixels


def make(recipe, dataset, micro_batch, batch_size=16) -> Trainer:
    budget = plan_budget(recipe, len(dataset.train_images), batch_size, epochs=2, micro_batch=micro_batch)
    return Trainer(recipe, dataset, budget, backend.reference(), precision.choose("fp32", DEVICE, False), False)


@pytest.mark.parametrize("recipe", [HLB, replace(AIR, keep=0.75)], ids=["hlb", "hardest"])
def test_one_part_is_the_whole(recipe):
    dataset = small_dataset(32, 8, side=16).to(DEVICE)
    results = [train(make(recipe, dataset, micro), 0, validate=0) for micro in (None, 16, 99)]
    for result in results[1:]:
        assert result.losses == results[0].losses
        assert all(torch.equal(value, results[0].state[name]) for name, value in result.state.items())


@pytest.mark.parametrize("micro_batch", [8, 6])
def test_gradients_of_the_parts_add_up(micro_batch):
    """Against each part by itself; 6 leaves a smaller last part."""
    dataset = small_dataset(64, 32, side=16).to(DEVICE)
    trainer = make(replace(HLB, keep=0.75), dataset, micro_batch)
    trainer.prepare(0)
    trainer.start_epoch(0, torch.Generator(DEVICE).manual_seed(0))
    phase, seen = trainer.phase_at(0), []
    trainer.optimizer.update = lambda grads, *_: seen.append([g.clone() for g in grads])
    statistics = {n: b.clone() for n, b in trainer.network.named_buffers()}
    gather, labels = trainer.batches.take(trainer.progress.batch, phase.size)
    arguments = (trainer.network, trainer.optimizer, trainer.batches, trainer.progress)
    training_step(*arguments, trainer._loss_of, trainer.precision, phase, micro_batch)

    def losses_of(network):
        network.load_state_dict(statistics, strict=False)
        for first in range(0, 16, micro_batch):
            part = slice(first, first + micro_batch)
            logits = network(trainer.batches.images(phase.size), gather.part(part))
            yield torch.nn.functional.cross_entropy(logits, labels[part], label_smoothing=0.2, reduction="none")

    losses = torch.cat(list(losses_of(trainer.network)))
    wanted = torch.autograd.grad(losses.sum(), trainer.optimizer.parameters(phase.active))
    for found, want in zip(seen[0], wanted):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert trainer.progress.losses[0].item() == pytest.approx(losses.mean().item(), rel=1e-5)
    hardness = trainer.batches.hardness[gather.index]
    assert hardness.shape == (16,) and (hardness < 100).all()


def test_running_statistics_follow_a_batch_as_far_as_they_would():
    """Of equal parts: what is kept of the old ones is the same."""
    dataset = small_dataset(64, 32, side=16).to(DEVICE)
    whole, parts = make(HLB, dataset, None), make(HLB, dataset, 4)
    norms = [[m.momentum for m in t.network.modules() if hasattr(m, "running_var")] for t in (whole, parts)]
    for a, b in zip(*norms):
        assert (1 - b) ** 4 == pytest.approx(1 - a)


def test_micro_batches_from_the_command_line(image_folder, tmp_path, capsys):
    words = ["train", "--data", str(image_folder), "--device", "cpu", "--steps", "2", "--batch-size", "8"]
    assert main([*words, "--micro-batch", "3", "--json", str(tmp_path / "x.json")]) == 0
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["budget"]["micro_batch"] == 3
    capsys.readouterr()
    # a last part of one image of 12x12, of which one value a channel is left
    assert main([*words, "--micro-batch", "7"]) == 2
    assert "leave 1 value per channel" in capsys.readouterr().err


def test_what_fits_is_measured(monkeypatch):
    """Where a step finds no memory, another process tries what does."""

    def step(*arguments):
        if arguments[-2] > 4:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: ...")
        training_step(*arguments)

    monkeypatch.setattr("blink.training.trainer.training_step", step)
    options = dict(batch_size=32, device="cpu", dtype="fp32", steps=2)
    with pytest.raises(UserError) as caught:
        blink.train(pixels(64, side=16), **options)
    # there, all do
    assert str(caught.value) == (
        "out of memory with 32 images at a time; 16 fit: use --micro-batch 16, which keeps the batch of 32, or "
        "--batch-size 16"
    )
    assert len(blink.train(pixels(64, side=16), micro_batch=4, **options)) == 1


def test_nothing_fits_and_other_errors(monkeypatch):
    def step(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB. GPU 0 has ...")

    monkeypatch.setattr("blink.training.trainer.training_step", step)
    # a process that can nothing
    monkeypatch.setattr(memory.sys, "executable", "false")
    with pytest.raises(UserError, match="out of memory with 8 images at a time, and with 2 as well; use smaller"):
        blink.train(pixels(16), batch_size=8, device="cpu", dtype="fp32", steps=2)
    assert not is_exhausted(RuntimeError("shapes differ")) and is_exhausted(MemoryError())


def test_other_commands_say_it_too(monkeypatch, capsys):
    for error, said in (
        (MemoryError("Unable to allocate 9 GiB"), "blink: out of memory (Unable to allocate 9 GiB); use fewer"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            "blink: out of memory (CUDA out of memory); use a",
        ),
    ):

        def fail(options, error=error):
            raise error

        monkeypatch.setattr("blink.training.show_recipes.run", fail)
        assert main(["recipes"]) == 2
        err = capsys.readouterr().err
        assert err.startswith(said) and err.count("\n") == 1


def test_a_real_lack_of_memory(tmp_path, monkeypatch, capsys):
    """A step of 40 images of 128x128 does not fit into 300 MB."""
    monkeypatch.setenv("BLINK_CACHE", str(tmp_path / "cache"))
    for half, count in (("train", 20), ("test", 2)):
        for name in "ab":
            (tmp_path / "images" / half / name).mkdir(parents=True)
            for i in range(count):
                value = np.random.RandomState(i).randint(0, 256, (4, 4, 3), dtype=np.uint8)
                Image.fromarray(value).resize((128, 128)).save(tmp_path / "images" / half / name / f"{i}.png")
    words = ["train", "--data", tmp_path / "images", "--device", "cpu", "--dtype", "fp32", "--steps", "2"]
    # narrow, which is quick
    words += [w for i in range(3) for w in ("--set", f"network.conv_groups.{i}.channels=16")]
    process = started([*words, "--batch-size", "40", "--validate", "0"], tmp_path / "printed", room=300 * 2**20)
    process.join()
    err = (tmp_path / "printed.err").read_text()
    assert process.exitcode == 2 and err.count("\n") == 1
    assert err.startswith("blink: out of memory with 40 images at a time; "), err
    assert 2 <= int(err.split(" fit: ")[0].rpartition(" ")[2]) <= 32
