"""`torchrun -m blink train --ddp`: several processes train one network as one process does."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blink.kernels import reference
from blink.kernels._synchronized import synchronized
from blink.kernels.gather import Gather
from blink.model import backend
from blink.training import distributed, peers
from blink.training.budget import Budget
from blink.training.distributed import ALONE, Ranks
from blink.training.loop import train_epoch
from blink.training.precision import Precision
from blink.training.recipes import RECIPES, Resolution, with_network
from blink.training.trainer import Trainer
from tests import ranks
from tests.processes import started
from tests.small import random_images, small_dataset
from tests.test_resume import QUICK, RECIPE, recipe

# what else a step or an epoch can do
ALL = dict(keep=0.9, cutout=3, jitter=(0.1, 0.1), flip="alternating", resolutions=(Resolution(0.5, 0.8),))


def joined(rank: int, size: int, port: int) -> Ranks:
    ranks.become(rank, size, port)
    return distributed.join(peers.peers(), torch.device("cpu"))


def trained(name: str, dtype: torch.dtype, steps: int, own: Ranks = ALONE) -> dict[str, torch.Tensor]:
    """Of a run of a narrowed recipe in batches of 16: weights, momenta, losses, weight average, logits."""
    full = RECIPES[name]
    narrow = tuple(replace(group, channels=8) for group in full.network.conv_groups)
    recipe = replace(with_network(full, conv_groups=narrow, se_reduction=full.network.se_reduction and 4), **ALL)
    precision = Precision("fp", dtype, dtype)
    budget = Budget(16, 4, steps)
    trainer = Trainer(recipe, small_dataset(80, 31, 16), budget, backend.reference(), precision, False, ranks=own)
    if dtype == torch.float64:
        # what else is in float32, so that nothing rounds in it
        trainer.network.double()
        trainer.progress.losses = trainer.progress.losses.double()
        trainer.optimizer.buffers = [[b.double() for b in buffers] for buffers in trainer.optimizer.buffers]
        if trainer.average is not None:
            trainer.average._live = [*trainer.network.state_dict().values()]
    trainer.restart(3)
    trainer.whiten()
    generator = torch.Generator().manual_seed(3)
    for epoch in range(budget.epochs):
        train_epoch(trainer, epoch, generator)
    with trainer.final_weights():
        logits = trainer.final_logits()
    counted = {"losses": trainer.progress.losses, "correct": trainer.progress.correct}
    return {**trainer.state(), **counted, "logits": logits}


def _train(rank: int, size: int, port: int, folder: Path, runs: list) -> None:
    own = joined(rank, size, port)
    for i, run in enumerate(runs):
        torch.save(trained(*run, own), folder / f"{i}-{rank}.pt")


@pytest.mark.parametrize("size", [2, 3])
def test_20_steps_are_those_of_one_process(tmp_path, size):
    """In float64, where nothing hides behind rounding; 16 images are no multiple of 3 ranks, nor are 31 test images.

    In float32 after few steps, and not as close: where two pixels of a pooling window are nearly alike, rounding
    decides which of them is the maximum.
    """
    runs = [
        ("blink", torch.float64, 20),
        ("hlb", torch.float64, 20),
        ("blink", torch.float32, 1),
        ("hlb", torch.float32, 2),
    ]
    ranks.together(size, _train, tmp_path, runs)
    for i, run in enumerate(runs):
        wanted, (first, *others) = trained(*run), [torch.load(tmp_path / f"{i}-{rank}.pt") for rank in range(size)]
        start = trained(run[0], run[1], 1)
        tolerance = 1e-8 if run[1] == torch.float64 else 3e-2
        assert wanted.keys() == first.keys()
        for name, value in wanted.items():
            # every rank has the same, to the last bit
            assert all(torch.equal(first[name], other[name]) for other in others), (run, name)
            if value.is_floating_point():
                assert (first[name] - value).norm() <= tolerance * (value.norm() + 0.1), (run, name)
            else:
                assert torch.equal(first[name], value), (run, name)
        for name in ("network.head.weight", "network.groups.1.conv1.weight") if run[2] == 20 else ():
            assert (wanted[name] - start[name]).norm() > 1e-2 * wanted[name].norm()


# an op, its arguments by name, and those that gradients are taken of
B, C, H, W = 5, 6, 4, 6


def _cases() -> dict[str, tuple[dict, tuple[str, ...]]]:
    torch.manual_seed(0)
    x, residual = (torch.randn(B, C, H, W).contiguous(memory_format=torch.channels_last) for _ in range(2))
    norm = {"bias": torch.randn(C), "weight": torch.rand(C)}
    images = random_images(9, 8, 7).permute(0, 3, 1, 2)
    stem = {"images": images, "whiten_weight": torch.randn(12, 3, 2, 2), "project_weight": torch.randn(C, 12, 1, 1)}
    stem |= {"bias": torch.randn(C), "mean": torch.rand(3), "std": torch.rand(3) + 0.5}
    index = torch.tensor([7, 1, 4, 0, 8])
    jitter = torch.stack([torch.rand(B) + 0.5, torch.rand(B) - 0.5], 1)
    return {
        "excite_norm_act_add": (
            {"x": x, "gate": torch.rand(B, C), **norm, "residual": residual}, ("x", "gate", "bias", "weight")),
        "norm_act": ({"x": x, **norm}, ("x", "bias", "weight")),
        "pool_norm_act": ({"x": x, **norm}, ("x", "bias", "weight")),
        "whiten_project_norm_act": ({**stem, "gather": Gather(index)}, ("project_weight", "bias")),
        "whiten_project_norm_act jittered": (
            {**stem, "gather": Gather(index, jitter=jitter)}, ("project_weight", "bias")),
    }  # fmt: skip


def _called(op, arguments: dict, inputs: tuple[str, ...], part: slice) -> list[torch.Tensor]:
    """Results, running statistics, gradients, of this part of the batch."""
    own = {}
    for name, value in arguments.items():
        if isinstance(value, Gather):
            own[name] = value.part(part)
        elif name in ("x", "gate", "residual"):
            own[name] = value[part].clone(memory_format=torch.preserve_format)
        else:
            own[name] = value.clone()
    wanted = [own[name].requires_grad_() for name in inputs]
    running = [torch.zeros(C), torch.ones(C)]
    y = op(**own, running_mean=running[0], running_var=running[1], momentum=0.3)
    ys = y if isinstance(y, tuple) else (y,)
    torch.manual_seed(1)
    upstream = [torch.randn(B, *value.shape[1:])[part] for value in ys]
    return [*(value.detach() for value in ys), *running, *torch.autograd.grad(ys, wanted, upstream)]


def _ops(rank: int, size: int, port: int, kernels: str, folder: Path) -> None:
    # read when the kernels are imported, which they were not before
    os.environ["TRITON_INTERPRET"] = "1"
    own, ops = joined(rank, size, port), reference
    if kernels == "fused":
        from blink.kernels import fused as ops
    part = own.share(B)
    with synchronized(own.group, part.stop - part.start, B):
        found = {name: _called(getattr(ops, name.split()[0]), *case, part) for name, case in _cases().items()}
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.parametrize("kernels", ["reference", "fused"])
def test_ops_normalize_by_the_batch_of_all_ranks(tmp_path, kernels):
    """2 and 3 of 5 images: each rank's part of what one process gives for all of them."""
    ranks.together(2, _ops, kernels, tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, (arguments, inputs) in _cases().items():
        wanted = _called(getattr(reference, name.split()[0]), arguments, inputs, slice(None))
        per_image = len(wanted) - 2 - len(inputs)
        for i, value in enumerate(wanted):
            label = (["result"] * per_image + ["mean", "var", *inputs])[i]
            parts = [results[name][i] for results in found]
            if label in ("mean", "var"):
                assert torch.equal(*parts), (name, label)
                got = parts[0]
            else:
                # of parameters, each rank has what its own images add to the gradient
                got = torch.cat(parts) if label in ("result", "x", "gate") else sum(parts)
            difference = (got - value).abs().max().item()
            assert difference <= 1e-5 * (1 + value.abs().max().item()), (name, label, difference)


def test_shares_cover_everything_once():
    for size in (1, 2, 3, 7):
        for count in (7, 16, 100):
            shares = [range(count)[Ranks(rank, size).share(count)] for rank in range(size)]
            assert [i for share in shares for i in share] == [*range(count)]
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
    # largest first, to whom has least
    assert Ranks(0, 2).owners([1, 5, 3, 3]) == [0, 0, 1, 1]


@pytest.fixture
def arguments(image_folder, tmp_path):
    (tmp_path / "mine.py").write_text(RECIPE)
    return ["train", "--data", image_folder, *QUICK, *recipe(tmp_path, "MUON"), "--runs", "2", "--ddp"]


def finished(tmp_path, words: list, size: int) -> None:
    codes = ranks.ended(ranks.started(size, words, tmp_path / "printed"))
    assert codes == [0] * size, [(tmp_path / f"printed-{rank}.err").read_text() for rank in range(size)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{seed}.{n}": t for seed in (0, 1) for n, t in load_file(folder / f"mine-seed{seed}.safetensors").items()}


def test_the_command_with_keep_best_interrupted_and_resumed(arguments, tmp_path):
    """Ends with the very weights of the unbroken one, on the same number of ranks."""
    arguments = [*arguments, "--keep", "best"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    finished(tmp_path, [*arguments, "--out", whole], 2)
    said = " ".join((tmp_path / "printed-0.out").read_text().split())
    assert "2 processes: each trains its share of every batch" in said and "run 2 of 2, seed 1" in said
    assert (tmp_path / "printed-1.out").read_text() == "" == (tmp_path / "printed-1.err").read_text()
    group = ranks.started(2, [*arguments, "--out", out], tmp_path / "cut")
    while not list(out.glob("*-epoch3.checkpoint")):
        assert group[0].exitcode is None
        time.sleep(0.01)
    for process in group:
        process.kill()
    ranks.ended(group)
    finished(tmp_path, ["train", "--resume", out, *recipe(tmp_path, "MUON")], 2)
    one, other = weights(whole), weights(out)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    runs, others = (json.loads((folder / "summary.json").read_text()) for folder in (whole, out))
    assert (runs["ranks"], runs["ddp"]) == (2, True)
    assert [run["losses"] for run in runs["runs"]] == [run["losses"] for run in others["runs"]]
    assert sorted(path.name for path in whole.iterdir()) == sorted(path.name for path in out.iterdir())


def test_who_is_left_by_another_says_so(arguments, tmp_path):
    out = tmp_path / "out"
    group = ranks.started(2, [*arguments, "--epochs", "40", "--validate", "0", "--out", out], tmp_path / "printed")
    while not list(out.glob("*.checkpoint")):
        assert group[0].exitcode is None
        time.sleep(0.01)
    group[1].kill()
    assert ranks.ended(group)[0] == 2
    err = (tmp_path / "printed-0.err").read_text()
    assert err.count("\n") == 1 and "rank 0 does not reach the others" in err and "--resume" in err
    # one process goes on with what two began
    rest = started(["train", "--resume", out, *recipe(tmp_path, "MUON")], tmp_path / "rest")
    rest.join()
    summary = json.loads((out / "summary.json").read_text())
    assert rest.exitcode == 0 and summary["ranks"] == 1 and len(summary["runs"]) == 2
