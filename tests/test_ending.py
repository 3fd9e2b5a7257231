"""Signals, pipes and full disks: how a command ends before its time and loses nothing."""

import io
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from blink import ending
from blink.__main__ import main
from tests.processes import started

ROOT = Path(__file__).resolve().parent.parent
LONG = ["--device", "cpu", "--dtype", "fp32", "--batch-size", "8", "--epochs", "100000", "--validate", "0"]


def until(condition, process) -> None:
    for _ in range(3000):
        if condition():
            return
        assert process.exitcode is None, "it ended"
        time.sleep(0.02)
    raise AssertionError("it never came to it")


@pytest.mark.parametrize(
    "number, code, said",
    [
        (signal.SIGTERM, 143, "ended by SIGTERM"),
        (signal.SIGHUP, 129, "ended by SIGHUP"),
        (signal.SIGINT, 130, "interrupted"),
    ],
)
def test_a_signal_leaves_a_checkpoint(image_folder, tmp_path, number, code, said):
    out, printed = tmp_path / "out", tmp_path / "printed"
    process = started(["train", "--data", image_folder, *LONG, "--out", out], printed)
    until(lambda: len(list(out.glob("*.checkpoint"))) == 2, process)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == code and printed.with_suffix(".err").read_text() == ""
    lines = printed.with_suffix(".out").read_text().splitlines()
    assert lines[-3:] == [said, "no run finished", f"go on with: blink train --resume {out}"]
    assert len(list(out.glob("*.checkpoint"))) == 2 and (out / "summary.json").exists()
    assert not list(out.glob("*.tmp"))


def test_another_command_says_one_line(image_folder, tmp_path):
    printed = tmp_path / "printed"
    words = ["ablate", "recipes", "--data", image_folder, "--device", "cpu", "--epochs-factor", "10000"]
    process = started([*words, "--json", tmp_path / "x.jsonl"], printed)
    until(
        lambda: (
            "the recipes against each other" in printed.with_suffix(".out").read_text()
            if printed.with_suffix(".out").exists()
            else False
        ),
        process,
    )
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 143
    assert printed.with_suffix(".err").read_text() == "blink: ended by SIGTERM; what is finished is kept\n"


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending.as_ctrl_c():
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(ending.Stopped) as stopped:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
            # a second one does not disturb what the first one left to do
            os.kill(os.getpid(), signal.SIGTERM)
        assert ending.exit_code(stopped.value) == 143 and ending.exit_code(KeyboardInterrupt()) == 130
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def training(image_folder, out: Path) -> list:
    return ["train", "--data", image_folder, *LONG, "--epochs", "3", "--out", out]


def is_complete(out: Path) -> bool:
    files = ["blink-seed0.gallery.safetensors", "blink-seed0.safetensors", "summary.json"]
    return sorted(path.name for path in out.iterdir()) == files


def test_a_reader_that_has_seen_enough_ends_no_training(image_folder, tmp_path):
    words = " ".join(map(str, training(image_folder, tmp_path / "out")))
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = f"set -o pipefail; {sys.executable} -m blink {words} | head -n 1"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and is_complete(tmp_path / "out")


FULL = "blink: the output could not be written ([Errno 28] No space left on device); what goes to files is kept\n"


@pytest.mark.parametrize("to, code, said", [(None, 0, ""), ("/dev/full", 2, FULL)])
def test_output_that_goes_nowhere_ends_no_training(image_folder, tmp_path, to, code, said):
    """None: closed by the caller."""
    process = started(training(image_folder, tmp_path / "out"), tmp_path / "printed", stdout=to)
    process.join()
    assert process.exitcode == code and (tmp_path / "printed.err").read_text() == said
    assert is_complete(tmp_path / "out")


def test_names_outside_the_terminals_encoding(image_folder, tmp_path):
    strange = image_folder.with_name("B\u00e4ume")
    image_folder.rename(strange)
    process = started(training(strange, tmp_path / "out"), tmp_path / "printed", encoding="ascii")
    process.join()
    assert process.exitcode == 0 and (tmp_path / "printed.err").read_text() == ""
    assert "Blink: blink on B?ume" in (tmp_path / "printed.out").read_text()


class Broken(io.StringIO):
    def write(self, text):
        raise OSError(5, "Input/output error")


def test_a_command_whose_output_breaks_says_so_once(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout", Broken())
    assert main(["recipes"]) == 2
    assert capsys.readouterr().err.count("could not be written ([Errno 5] Input/output error)") == 1


def test_ctrl_c_within_the_imports_is_one_line(monkeypatch, capsys):
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("blink.command.import_module", interrupt)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "blink: interrupted; what is finished is kept\n"


def test_ctrl_c_in_a_report_of_many_processes(tmp_path):
    """To the whole group, as a terminal sends it: nobody else says anything."""
    command = [sys.executable, "-m", "blink", "inspect", "--quick"]
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # what begins in the background of a shell ignores it
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    # the workers and what tracks their memory
    while len(children.read_text().split()) < 2 and process.poll() is None:
        time.sleep(0.05)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130 and err == "blink: interrupted; what is finished is kept\n", (out, err)
