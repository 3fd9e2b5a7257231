"""A budget that cannot end says how long it would take, before it begins."""

import re
import time

import pytest

from blink.training import duration
from tests.processes import started


class Stub:
    def __init__(self, steps):
        self.budget = type("Budget", (), {"total_steps": steps})


@pytest.mark.parametrize(
    "steps, seconds, said",
    [
        (9_999, 1e9, None),
        (20_000, 1.0, None),
        (20_000, 2.0, "a run of 20,000 steps takes about 11 hours here; --epochs or --steps set fewer"),
        (1_000_000, 1.0, "a run of 1,000,000 steps takes about 12 days here; --epochs or --steps set fewer"),
        (100_000_000, 10.0, "a run of 100,000,000 steps takes about 32 years here; --epochs or --steps set fewer"),
    ],
)
def test_what_is_said(monkeypatch, steps, seconds, said):
    monkeypatch.setattr(duration, "_seconds_of_a_step", lambda job: seconds)
    assert duration.warning(Stub(steps)) == said


def test_it_is_said_before_a_run_begins(image_folder, tmp_path):
    words = ["train", "--data", image_folder, "--device", "cpu", "--batch-size", "4", "--epochs", "1e6"]
    said = tmp_path / "printed.out"
    process = started([*words, "--validate", "0"], tmp_path / "printed")
    while process.exitcode is None and (not said.exists() or "epoch " not in said.read_text()):
        time.sleep(0.05)
    process.terminate()
    process.join()
    assert process.exitcode == 143
    printed = " ".join(said.read_text().split())
    assert re.search(r"a run of 10,000,000 steps takes about \d+ (hours|days|years) here", printed)
