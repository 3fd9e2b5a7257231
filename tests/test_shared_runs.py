"""`torchrun -m blink train --runs N`: each process trains some of the seeds, and dies without taking a run along."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from blink.__main__ import main
from blink.errors import UserError
from blink.training.peers import Place, place
from tests import ranks
from tests.processes import started
from tests.test_resume import QUICK, RECIPE, assert_alike, recipe, results

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def arguments(image_folder, tmp_path):
    (tmp_path / "mine.py").write_text(RECIPE)
    return ["train", "--data", image_folder, *QUICK, *recipe(tmp_path, "PLAIN")]


def whole(arguments, tmp_path) -> Path:
    """The --out folder of the same in one process."""
    process = started([*arguments, "--out", tmp_path / "whole"], tmp_path / "whole-printed")
    process.join()
    assert process.exitcode == 0, (tmp_path / "whole-printed.err").read_text()
    return tmp_path / "whole"


def printed(tmp_path, rank: int) -> tuple[str, str]:
    """(standard output, its line breaks ignored; standard error) of a rank."""
    out = (tmp_path / f"printed-{rank}.out").read_text()
    assert all(len(line) <= 80 for line in out.splitlines() if " " in line and "/" not in line)
    return " ".join(out.split()), (tmp_path / f"printed-{rank}.err").read_text()


def until(condition) -> None:
    for _ in range(1500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it never came to it")


def test_every_run_is_what_it_is_alone(arguments, tmp_path):
    """Bit for bit; rank 0 has all in its summary, its CSV file and its JSON, in the order of the seeds."""
    arguments = [*arguments, "--epochs", "3", "--runs", "4", "--keep", "best", "--seed", "5"]
    files = ["--csv", tmp_path / "all.csv", "--json", tmp_path / "all.json"]
    group = ranks.started(3, [*arguments, *files, "--out", tmp_path / "out"], tmp_path / "printed")
    assert ranks.ended(group) == [0, 0, 0], [printed(tmp_path, rank) for rank in range(3)]
    assert_alike(whole(arguments, tmp_path), tmp_path / "out")
    content = json.loads((tmp_path / "all.json").read_text())
    assert [run["seed"] for run in content["runs"]] == [5, 6, 7, 8]
    assert (content["ranks"], content["ddp"], content["summary"]["accuracy"]["n"]) == (3, False, 4)
    rows = [line.split(",")[:3] for line in (tmp_path / "all.csv").read_text().splitlines()[1:]]
    assert sorted(row[1] for row in rows) == ["5"] * 3 + ["6"] * 3 + ["7"] * 3 + ["8"] * 3
    assert [row[2] for row in rows] == ["1", "2", "3"] * 4
    out, err = printed(tmp_path, 0)
    assert err == "" and "3 processes: each takes the next run when it is free" in out and "n = 4" in out
    elsewhere = {run["seed"]: run["accuracy"] for run in content["runs"] if f"run {run['seed'] - 4} of 4" not in out}
    for seed, accuracy in elsewhere.items():
        assert f"seed {seed} on rank" in out and f": accuracy {accuracy:.4f}" in out
    assert [printed(tmp_path, rank) for rank in (1, 2)] == [("", ""), ("", "")]


def test_what_a_killed_rank_had_is_trained_by_another(arguments, tmp_path):
    arguments = [*arguments, "--runs", "3"]
    out = tmp_path / "out"
    group = ranks.started(2, [*arguments, "--epochs", "30", "--validate", "0", "--out", out], tmp_path / "printed")
    until(lambda: len({path.name.split("-epoch")[0] for path in out.glob("*.checkpoint")}) == 2)
    os.kill(group[1].pid, signal.SIGKILL)
    assert ranks.ended(group) == [0, -signal.SIGKILL], printed(tmp_path, 0)
    said, err = printed(tmp_path, 0)
    assert err == "" and said.count("rank 1 is gone; what it had not finished is trained again: seed") == 1
    assert_alike(whole([*arguments, "--epochs", "30", "--validate", "0"], tmp_path), out)


def test_all_are_ended_and_one_process_goes_on(arguments, tmp_path):
    """SIGTERM, as torchrun sends it when one of them has failed."""
    arguments, out = [*arguments, "--runs", "3", "--epochs", "25", "--validate", "0"], tmp_path / "out"
    group = ranks.started(2, [*arguments, "--out", out], tmp_path / "printed")
    until(lambda: len({path.name.split("-epoch")[0] for path in out.glob("*.checkpoint")}) == 2)
    for process in group:
        os.kill(process.pid, signal.SIGTERM)
    assert ranks.ended(group) == [143, 143]
    said, err = printed(tmp_path, 0)
    assert "ended by SIGTERM" in said and "not finished: seeds 0, 1, 2" in said and "go on with: blink train" in said
    assert err == "" and printed(tmp_path, 1) == ("", "")
    again = started(["train", "--resume", out, *recipe(tmp_path, "PLAIN")])
    again.join()
    assert again.exitcode == 0
    assert_alike(whole(arguments, tmp_path), out)


def test_torchrun_starts_them_again_and_they_go_on(arguments, tmp_path):
    """What is finished is kept, though the summary does not know of it: the networks' files do."""
    arguments, out = [*arguments, "--epochs", "1", "--runs", "2"], tmp_path / "out"
    assert main([*map(str, arguments), "--out", str(out)]) == 0
    before, _ = results(out)
    summary = json.loads((out / "summary.json").read_text())
    took = {run["seed"]: run["seconds"] for run in summary["runs"]}
    (out / "summary.json").write_text(json.dumps({**summary, "runs": []}))
    words = [*arguments[:-1], "3", "--out", out]
    group = ranks.started(2, words, tmp_path / "printed", TORCHELASTIC_RESTART_COUNT="1")
    assert ranks.ended(group) == [0, 0], printed(tmp_path, 0)
    seconds = {run["seed"]: run["seconds"] for run in json.loads((out / "summary.json").read_text())["runs"]}
    # the same to the last digit: they were not trained again
    assert {seed: seconds[seed] for seed in took} == took and set(seconds) == {0, 1, 2}
    assert results(out)[0][:2] == before


MISTAKES = [
    (["train", "--data", "nowhere"], "there is no"),
    (["train", "--steps", "0"], "above 0"),
    (["train", "--data", "synthetic", "--device", "cpu", "--limit", "8", "--ddp", "--kernels", "compiled"], "--ddp"),
    (["train", "--data", "synthetic", "--device", "cpu", "--limit", "8", "--ddp", "--batch-size", "1"], "2 processes"),
    (["train", "--data", "synthetic", "--ddp", "--micro-batch", "2"], "--micro-batch both part a batch"),
    (["recipes"], "blink recipes runs in one process"),
]


@pytest.mark.parametrize("words, message", MISTAKES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_mistake_is_one_line_of_rank_0(tmp_path, words, message):
    assert ranks.ended(ranks.started(2, words, tmp_path / "printed")) == [2, 2]
    said, err = printed(tmp_path, 0)
    assert said == "" and err.startswith("blink: ") and err.count("\n") == 1 and message in err
    assert printed(tmp_path, 1) == ("", "")


def test_the_mistake_of_another_rank_is_said_by_rank_0(arguments, tmp_path):
    """A folder that is not shared: rank 1 has an --out of its own, as on another machine."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    port, words = ranks.free_port(), [*map(str, arguments), "--epochs", "1", "--out", "out"]
    group = [
        ranks.forked.started(_in_folder, tmp_path / where, rank, port, words, tmp_path / f"printed-{rank}")
        for rank, where in enumerate(("here", "there"))
    ]
    assert ranks.ended(group) == [2, 2]
    _, err = printed(tmp_path, 0)
    assert err.count("\n") == 1 and "blink: rank 1: --out out of rank 1 is not the folder" in err
    assert printed(tmp_path, 1) == ("", "")


def _in_folder(folder: Path, rank: int, port: int, *rest) -> None:
    os.chdir(folder)
    ranks._command(rank, 2, port, {}, *rest, "", "utf-8", None)


def test_ddp_needs_a_launcher(capsys):
    assert main(["train", "--ddp"]) == 2
    assert "torchrun --nproc-per-node=2 -m blink train --ddp" in capsys.readouterr().err


def test_the_place_of_a_process(monkeypatch):
    assert place() == Place()
    told = dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4", GROUP_RANK="1", MASTER_ADDR="there")
    for name, value in {**told, "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert place() == Place(5, 8, 1, 4, 1, 0, True)
    monkeypatch.setenv("RANK", "9")
    with pytest.raises(UserError, match="less than WORLD_SIZE=8"):
        place()
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UserError, match="expected a number"):
        place()


def test_a_rank_has_its_own_gpu(monkeypatch):
    here = Place(5, 8, 1, 4, 1, 0, True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert here.device(None) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert (here.device(None), here.device("cuda"), here.device("cpu")) == ("cuda:1", "cuda:1", "cpu")
    with pytest.raises(UserError, match="one device for 4 processes"):
        here.device("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="4 processes on a machine with 2 GPUs"):
        here.device(None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert here.device(None) == "cuda:0"
    assert Place().device("cuda:7") == "cuda:7"


def test_torchrun_itself(arguments, tmp_path):
    out = tmp_path / "out"
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "COLUMNS")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "blink"]
    command += [*map(str, arguments), "--epochs", "1", "--runs", "2", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Blink: mine on") == 1 and "n = 2" in done.stdout
    assert [run["seed"] for run in results(out)[0]] == [0, 1]
