"""Schedule, budget, precision, and the report's numbers and files."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blink import __version__
from blink.errors import UserError
from blink.files import write_json
from blink.model import convolution
from blink.training import precision
from blink.training.budget import Budget, plan_budget
from blink.training.loop import check_finite
from blink.training.recipes import AIR, HLB, Schedule
from blink.training.results import spread

ROOT = Path(convolution.__file__).resolve().parent.parent


def factors(total, recipe=HLB):
    return [recipe.schedule.factor(step, total) for step in range(total)]


@pytest.mark.parametrize("total", [10, 50, 100, 240, 970, 1000])
def test_schedule_rises_from_0_to_1_at_a_fifth_and_ends_constant(total):
    values = factors(total)
    peak = total // 5 - 1
    assert values[0] == 0 and values[peak] == pytest.approx(1, abs=1e-12)
    rises = [b - a for a, b in pairwise(values[: peak + 1])]
    assert rises == pytest.approx([1 / peak] * peak)
    tail = values[total - total // 5 :]
    assert tail == [0.135] * (total // 5)
    assert all(a > b for a, b in pairwise(values[peak : total - total // 5]))
    assert sum(value == 0.135 for value in values) == total // 5 + 1


@given(st.integers(1, 3000))
@settings(deadline=None, max_examples=60)
def test_schedule_stays_within_0_and_1_and_turns_once(total):
    values = factors(total)
    assert all(0 <= value <= 1 for value in values)
    top = values.index(max(values))
    assert values[:top] == sorted(values[:top])
    assert values[top:] == sorted(values[top:], reverse=True)


@pytest.mark.parametrize("total", range(1, 11))
def test_short_schedules_train(total):
    values = factors(total)
    assert len(values) == total and all(0 <= value <= 1 for value in values)
    assert sum(values) > 0.5


def test_schedule_follows_the_recipe():
    recipe = replace(HLB, schedule=Schedule(peak=0.5, final=0.02, hold=0.3))
    values = factors(100, recipe)
    assert values[49] == 1 and values[48] < 1 and values[69:] == [0.02] * 31 and values[68] > 0.02


def test_a_schedule_without_a_hold_falls_linearly_to_just_above_0():
    assert factors(8, AIR) == pytest.approx([1 - step / 8 for step in range(8)])


@pytest.mark.parametrize(
    ("images", "options", "expected"),
    [
        pytest.param(1, {}, (1, 1, 10), id="1 image"),
        pytest.param(2, {}, (2, 1, 10), id="2 images"),
        pytest.param(20, {}, (2, 10, 100), id="20 images"),
        pytest.param(100, {}, (4, 25, 250), id="100 images"),
        pytest.param(3072, {}, (128, 24, 240), id="3072 images"),
        pytest.param(8192, {}, (512, 16, 160), id="8192 images"),
        pytest.param(50_000, {}, (512, 97, 970), id="CIFAR-10"),
        pytest.param(50_000, dict(batch_size=1000), (1000, 50, 500), id="explicit batch"),
        pytest.param(100, dict(batch_size=512), (100, 1, 10), id="explicit batch above the images"),
        pytest.param(100, dict(batch_size=64), (64, 1, 10), id="explicit batch above the clamp"),
        pytest.param(50_000, dict(epochs=0.5), (512, 97, 48), id="half an epoch"),
        pytest.param(20, dict(epochs=1e-9), (2, 10, 1), id="never zero steps"),
        pytest.param(50_000, dict(steps=7), (512, 97, 7), id="steps"),
        pytest.param(20, dict(steps=25), (2, 10, 25), id="steps over several epochs"),
    ],
)
def test_budget(images, options, expected):
    budget = plan_budget(HLB, images, **options)
    assert (budget.batch_size, budget.steps_per_epoch, budget.total_steps) == expected


@given(st.integers(1, 60_000), st.none() | st.integers(1, 70_000), st.none() | st.floats(1e-6, 20))
@settings(deadline=None, max_examples=60)
def test_budget_always_fits_the_data(images, batch_size, epochs):
    budget = plan_budget(HLB, images, batch_size, epochs)
    assert 1 <= budget.batch_size <= images
    assert budget.steps_per_epoch == images // budget.batch_size >= 1
    assert 1 <= budget.total_steps <= budget.epochs * budget.steps_per_epoch
    assert (budget.epochs - 1) * budget.steps_per_epoch < budget.total_steps


@pytest.mark.parametrize(
    ("bad", "text"), [(float("nan"), "nan"), (float("inf"), "inf")], ids=["not a number", "infinite"]
)
@pytest.mark.parametrize(
    ("dtype", "advice"), [("bf16", "--dtype fp32, a larger --batch-size"), ("fp32", "a larger --batch-size")]
)
def test_check_finite_names_the_first_bad_step(bad, text, dtype, advice):
    """And advises only what is not so already."""
    budget = Budget(batch_size=64, steps_per_epoch=10, total_steps=40)
    chosen = precision.choose(dtype, torch.device("cpu"), interpreted=False)
    check_finite(torch.tensor([2.3, 1.0]), 20, budget, chosen)
    message = rf"became {text} at step 23 of 40 \(batch size 64\); expected a finite loss: try {advice}"
    with pytest.raises(UserError, match=message) as raised:
        check_finite(torch.tensor([2.3, 1.0, bad, float("nan")]), 20, budget, chosen)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("values", "mean", "std", "ci95"),
    [
        ([0.94], 0.94, None, None),
        ([1.0, 3.0], 2.0, 2**0.5, 12.7062047),
        ([1.0, 2.0, 3.0], 2.0, 1.0, 4.3026527 / 3**0.5),
        ([5.0, 5.0, 5.0], 5.0, 0.0, 0.0),
    ],
    ids=["n=1", "n=2", "n=3", "equal"],
)
def test_spread_against_hand_values(values, mean, std, ci95):
    found = spread(values)
    assert found["n"] == len(values) and found["mean"] == pytest.approx(mean)
    assert found["std"] == (None if std is None else pytest.approx(std))
    assert found["ci95"] == (None if ci95 is None else pytest.approx(ci95))


def test_write_json_round_trips_and_replaces(tmp_path):
    path = tmp_path / "out.json"
    write_json(path, {"old": 1})
    write_json(path, {"runs": [0.5, None, "é"]})
    assert json.loads(path.read_text()) == {"blink": __version__, "runs": [0.5, None, "é"]}
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def _full_disk_while_writing(monkeypatch):
    write = Path.write_bytes

    def half(self, content):
        write(self, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)


def _full_disk_while_replacing(monkeypatch):
    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)


@pytest.mark.parametrize(
    "fail", [_full_disk_while_writing, _full_disk_while_replacing], ids=["while writing", "while replacing"]
)
def test_failed_write_json_leaves_the_old_file_whole(tmp_path, monkeypatch, fail):
    path = tmp_path / "out.json"
    write_json(path, {"old": 1})
    with monkeypatch.context() as patched:
        fail(patched)
        with pytest.raises(UserError, match=r"could not write .*out\.json \(No space left on device\)"):
            write_json(path, {"new": list(range(100))})
    assert json.loads(path.read_text())["old"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_what_is_no_file_is_written_to_and_never_replaced(tmp_path):
    """A pipe, as /dev/stdout may be one; a link, whose file is replaced in its place."""
    pipe, link, file = (tmp_path / name for name in ("pipe", "link.json", "file.json"))
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_json(pipe, {"new": 1})
        assert json.loads(os.read(reader, 100))["new"] == 1 and pipe.is_fifo()
    finally:
        os.close(reader)
    link.symlink_to(file)
    for content in ({"old": 1}, {"new": 1}):
        write_json(link, content)
        assert json.loads(file.read_text()).items() >= content.items() and link.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.json", "link.json", "pipe"]


@pytest.mark.parametrize(
    ("name", "device", "bf16", "interpreted", "expected"),
    [
        (None, "cpu", False, False, ("fp32", torch.float32, torch.float32)),
        (None, "cpu", True, False, ("bf16", torch.bfloat16, torch.float32)),
        (None, "cpu", True, True, ("fp32", torch.float32, torch.float32)),
        (None, "cuda", False, False, ("fp16", torch.float16, torch.float16)),
        ("fp32", "cpu", True, False, ("fp32", torch.float32, torch.float32)),
        ("bf16", "cpu", False, False, ("bf16", torch.bfloat16, torch.float32)),
        ("fp16", "cpu", False, False, ("fp16", torch.float16, torch.float16)),
        ("fp32", "cuda", False, False, ("fp32", torch.float32, torch.float32)),
        ("bf16", "cuda", False, False, ("bf16", torch.bfloat16, torch.bfloat16)),
    ],
    ids=lambda value: None if isinstance(value, tuple) else str(value),
)
def test_precision(monkeypatch, name, device, bf16, interpreted, expected):
    monkeypatch.setattr(precision, "fast_bf16", lambda: bf16)
    chosen = precision.choose(name, torch.device(device), interpreted)
    assert (chosen.name, chosen.compute, chosen.weights) == expected
    context = chosen.autocast(torch.device(device)) if device == "cpu" else None
    if context is not None:
        assert isinstance(context, nullcontext) == (chosen.compute == chosen.weights)


AMD, INTEL = "vendor_id\t: AuthenticAMD\n", "vendor_id\t: GenuineIntel\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (AMD + "flags\t: fpu avx2 avx512_bf16 sse\n", True),
        (INTEL + "flags\t: fpu avx2 avx512_bf16 sse\n", False),
        (INTEL + "flags\t: fpu avx512_bf16 amx_bf16\n", True),
        (AMD + "flags\t: fpu avx2 sse\n", False),
        ("Features\t: fp asimd bf16\n", True),
        ("", False),
        (None, False),
    ],
    ids=["AMD with", "Intel with", "Intel with AMX", "x86 without", "Arm with", "empty", "no such file"],
)
def test_fast_bf16_is_read_from_the_processors_flags(monkeypatch, text, expected):
    def read(self):
        if text is None:
            raise FileNotFoundError(self)
        return text

    monkeypatch.setattr(Path, "read_text", read)
    convolution.cpu_flags.cache_clear()
    try:
        assert convolution.fast_bf16() is expected
    finally:
        convolution.cpu_flags.cache_clear()


def test_freed_memory_is_kept_in_a_process_that_asks_for_it():
    """The same 64 MB again and again soon cost no page faults; in a process of its own, because it is for good."""
    code = (
        "import resource, torch\n"
        "from training.allocator import keep_freed_memory\n"
        "assert keep_freed_memory()\n"
        "def faults():\n    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(10):\n    torch.ones(1 << 24)\n"
        "before = faults()\n"
        "for _ in range(10):\n    torch.ones(1 << 24)\n"
        "print(faults() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    # one mapping of 64 MB is 16384 pages
    assert int(done.stdout) < 16384, done.stderr
