"""Where progress bars are shown, what they count, and that files and pipes get none."""

import io

import pytest
import torch
from rich.console import Console

from blink.__main__ import main
from blink.experiments import until
from blink.experiments.race import contest
from blink.training import bars


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=80)


def test_bars_are_shown_on_a_terminal_and_in_a_notebook_only(monkeypatch):
    notebook = Console(file=io.StringIO(), force_jupyter=True)
    monkeypatch.setattr(bars, "find_spec", lambda name: name if name == "ipywidgets" else None)
    assert bars.shows_bars(terminal()) and bars.shows_bars(notebook)
    assert not bars.bars(notebook).disable and bars.bars(Console(file=io.StringIO())).disable
    # rich would draw a quiet console's bar in a notebook
    assert not bars.shows_bars(Console(quiet=True, force_jupyter=True))
    monkeypatch.setattr(bars, "find_spec", lambda name: None)
    assert not bars.shows_bars(notebook)


def test_runs_and_their_steps_are_counted():
    console = terminal()
    with bars.RunBars(console, 3) as shown:
        runs, steps = shown._bars.tasks
        shown.begin(2, "seed 1  [se] off", 10)
        assert (runs.completed, runs.total, steps.description) == (1, 3, "seed 1  [se] off")
        shown.on_step(4, torch.zeros(5))
        assert (steps.completed, steps.total) == (4, 10)
        shown._bars.refresh()
        shown.on_end(None)
        assert runs.completed == 2
    drawn = console.file.getvalue()
    # brackets are no markup
    assert "seed 1  [se] off" in drawn and "4/10" in drawn and "1/3" in drawn


def test_a_pipe_gets_the_lines_and_no_bar(image_folder, capsys):
    arguments = ["--data", str(image_folder), "--recipe", "air", "--set", "network.conv_groups.2.channels=8"]
    assert main(["until", "0.0001", *arguments, "--epochs", "0.25", "--batch-size", "10", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "runs of" not in out and "\x1b" not in out and "smallest: 0.25 epochs" in out


def test_until_shows_its_runs_on_a_terminal(image_folder, monkeypatch):
    console = terminal()
    monkeypatch.setattr(until, "Console", lambda **options: console)
    arguments = ["--data", str(image_folder), "--recipe", "air", "--set", "network.conv_groups.2.channels=8"]
    options = ["--epochs", "0.25", "--batch-size", "10", "--device", "cpu", "--runs", "2"]
    assert main(["until", "0.0001", *arguments, *options]) == 0
    assert "runs of 0.25 epochs" in console.file.getvalue() and "2/2" in console.file.getvalue()


def test_a_block_of_a_race_is_looked_at_while_it_runs(tmp_path, monkeypatch):
    """A stand-in for a script: a run a line, the second one only once somebody has seen the first."""
    code = (
        "import pathlib, sys, time\n"
        "out, seen = map(pathlib.Path, sys.argv[1:])\n"
        'line = \'{"accuracy": 0.5, "seconds": 1.0, "our_seconds": 1.0}\\n\'\n'
        "out.write_text(line)\n"
        "while not seen.exists(): time.sleep(0.01)\n"
        "out.write_text(2 * line)\n"
    )
    seen, counts = tmp_path / "seen", []

    class Script(contest.Contestant):
        def command(self, runs, seed, out, device):
            return [contest.sys.executable, "-c", code, str(out), str(seen)]

    def look(ended):
        counts.append(ended)
        if ended == 1:
            seen.touch()

    monkeypatch.setattr(contest, "_LOOK_EVERY", 0.05)
    peer = contest.Peer("stand-in", "x.py", (), (), 0, "airbench", "accuracy", "seconds")
    block = contest.run_block(Script("stand-in", tmp_path, peer), 2, 0, torch.device("cpu"), tmp_path, look)
    assert len(block.runs) == 2 and block.error is None and 1 in counts


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_interrupts_a_race_ends_its_process(error, tmp_path, monkeypatch):
    processes = []

    class Process(contest.subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            processes.append(self)

    class Script(contest.Contestant):
        def command(self, runs, seed, out, device):
            return [contest.sys.executable, "-c", "import time; time.sleep(600)"]

    def look(ended):
        raise error

    monkeypatch.setattr(contest.subprocess, "Popen", Process)
    monkeypatch.setattr(contest, "_LOOK_EVERY", 0.05)
    with pytest.raises(error):
        contest.run_block(Script("blink", tmp_path), 1, 0, torch.device("cpu"), tmp_path, look)
    assert processes[0].poll() is not None
