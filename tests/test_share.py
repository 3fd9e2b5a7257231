"""Several processes of blink ablate on one file: what each trains, what a killed one leaves, what all of them write."""

import os
import random
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread

import pytest
import torch

from blink.__main__ import main
from blink.errors import UserError
from blink.experiments import ablate, claims, records, runs
from tests.forked import started
from tests.test_ablate import record
from tests.test_claims import age, change_owner

# more of them by hand: BLINK_KILLS=50 pytest tests/test_share.py -k killed_at_random
KILLS = int(os.environ.get("BLINK_KILLS", "10"))
PLAN = """
from blink.experiments.plans import Plan
from blink.training.recipes import AIR, HLB

ASKED = Plan("what a test asks", {"first": AIR, "second": HLB})
"""


@pytest.fixture(autouse=True)
def _one_thread():
    """Small runs take no more, and wait for none."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def words(image_folder, tmp_path):
    """Of blink ablate, but for its file; every run is an epoch of a few steps."""
    (tmp_path / "mine.py").write_text(PLAN)
    scaled = ["--batch-size", "8", "--width", "0.1", "--epochs-factor", "0.1"]
    return ["ablate", f"{tmp_path / 'mine.py'}:ASKED", "--data", str(image_folder), "--device", "cpu", *scaled]


@pytest.fixture
def path(tmp_path):
    """A file of runs in a folder of its own."""
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs" / "all.jsonl"


def fail(line: str) -> None:
    raise AssertionError(line)


# -- lines


def test_the_beginning_of_a_line_is_passed_over_and_replaced(path):
    """Wherever a killed process was."""
    lines = [records.as_line({"n": n, "text": "{[]}"}) for n in range(3)]
    for cut in range(1, len(lines[1])):
        path.write_bytes(lines[0] + lines[1][:cut])
        told = []
        found = records.read(path, note=told.append)
        # all but its end: it is whole
        whole = cut == len(lines[1]) - 1
        assert [each["n"] for each in found] == ([0, 1] if whole else [0])
        assert told == ([] if whole else [f"line 2 of {path} was not finished and does not count; its run is missing"])
        assert records.append(path, {"n": 2, "text": "{[]}"})
        assert path.read_bytes() == lines[0] + (lines[1] if whole else b"") + lines[2]


def test_what_no_record_begins_with_is_named(path):
    path.write_text("notes of mine")
    with pytest.raises(UserError, match="line 1 of"):
        records.read(path)


def test_a_record_of_a_known_key_is_not_added(path):
    assert records.append(path, {"n": 1, "text": "a"}, lambda each: each["n"])
    assert not records.append(path, {"n": 1, "text": "b"}, lambda each: each["n"])
    assert records.read(path) == [{"n": 1, "text": "a"}]


def append_many(path: Path, who: int) -> None:
    for number in range(25):
        records.append(path, {"who": who, "number": number, "text": "x" * random.Random(number).randrange(20_000)})


def test_processes_that_add_at_once_write_whole_lines(path):
    processes = [started(append_many, path, who) for who in range(4)]
    while any(process.exitcode is None for process in processes):
        # whoever waits for the lock sees whole lines too
        records.read(path, note=fail, wait=True)
        time.sleep(0.02)
    assert [process.exitcode for process in processes] == [0] * 4
    found = records.read(path, note=fail)
    for who in range(4):
        assert [each["number"] for each in found if each["who"] == who] == list(range(25))


def append_when_told(path: Path, begun: Path) -> None:
    begun.touch()
    records.append(path, {"n": 1})


def read_when_told(path: Path, begun: Path) -> None:
    begun.touch()
    os._exit(10 + len(records.read(path, note=fail, wait=True)))


@pytest.mark.parametrize(("function", "exit_code"), [(append_when_told, 0), (read_when_told, 11)])
def test_whoever_adds_or_looks_waits_for_who_adds(path, tmp_path, function, exit_code):
    line = records.as_line({"n": 0})
    with records.locked(path) as file:
        file.write(line[:4])
        process = started(function, path, tmp_path / "begun")
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        # it would have done it by now
        time.sleep(0.5)
        file.write(line[4:])
    process.join()
    assert process.exitcode == exit_code
    assert [each["n"] for each in records.read(path, note=fail)] == ([0, 1] if function is append_when_told else [0])


def test_runs_that_are_there_twice_are_told(path):
    for run in (record("base", 0, 0.8), record("base", 1, 0.7), record("base", 0, 0.1)):
        records.append(path, run)
    told = []
    assert [run["accuracy"] for run in runs.read(path, told.append)] == [0.8, 0.7]
    assert told == [f"{path} holds seed 0 of 'base' twice; the first counts"]
    records.append(path, record("base", 2, 0.8, recipe={"name": "changed"}))
    with pytest.raises(UserError, match="of 'base' of two recipes or budgets"):
        runs.read(path, told.append)


# -- the command


def test_two_are_told_apart_by_what_they_train(words, path, capsys):
    """A run that another process trains is waited for, and trained here when its owner is gone."""
    assert main([*words, "--json", str(path), "--runs", "2"]) == 0
    whole = runs.read(path)
    # as if another machine trained the second one
    path.write_bytes(b"".join(map(records.as_line, whole[:1])))
    elsewhere = change_owner(claims.Claims(path).take(whole[1]), host="node7", process=4711, machine="elsewhere")
    capsys.readouterr()
    assert main([*words, "--json", str(path), "--runs", "2", "--no-wait"]) == 0
    out = capsys.readouterr().out
    assert "1 of 4 runs are left to node7 (process 4711)" in out and "n = 1 to 2;" in " ".join(out.split())
    assert [(run["variant"], run["seed"]) for run in runs.read(path)] == [("first", 0), ("first", 1), ("second", 1)]
    assert elsewhere.exists()

    waiting = Thread(target=lambda: (time.sleep(0.5), age(elsewhere, 2 * claims.VOID_AFTER)))
    waiting.start()
    assert main([*words, "--json", str(path), "--runs", "2"]) == 0
    waiting.join()
    out = capsys.readouterr().out
    assert out.count("1 of 4 runs are waited for: node7 (process 4711)") == 1
    assert "   2 of 4  seed 0" in out and "n = 2;" in out
    found = {runs.identity(run): run["epoch_losses"] for run in runs.read(path, fail)}
    assert found == {runs.identity(run): run["epoch_losses"] for run in whole}
    assert list(path.parent.iterdir()) == [path]


def test_waiting_ends_with_the_minutes(words, path, capsys):
    assert main([*words, "--json", str(path), "--only", "first"]) == 0
    (run,) = runs.read(path)
    path.unlink()
    change_owner(claims.Claims(path).take(run), machine="elsewhere")
    assert main([*words, "--json", str(path), "--only", "first", "--minutes", "0.02"]) == 0
    assert "stopped before run 1 of 1: 0.02 minutes would not hold it" in capsys.readouterr().out
    assert runs.read(path) == []


def test_a_run_that_another_process_wrote_meanwhile_is_not_written_again(words, path, capsys, monkeypatch):
    """Its owner was suspended for so long that its claim was void."""
    assert main([*words, "--json", str(path), "--only", "first"]) == 0
    (run,) = runs.read(path)
    path.unlink()
    train = ablate.train

    def suspended(*arguments, **options):
        records.append(path, {**run, "accuracy": 0.125})
        return train(*arguments, **options)

    monkeypatch.setattr(ablate, "train", suspended)
    assert main([*words, "--json", str(path), "--only", "first"]) == 0
    assert "wrote seed 0 of 'first' meanwhile" in " ".join(capsys.readouterr().out.split())
    assert [each["accuracy"] for each in runs.read(path, fail)] == [0.125]


def test_a_run_that_was_written_between_the_look_and_the_claim_is_not_trained(words, path, monkeypatch):
    assert main([*words, "--json", str(path), "--only", "first"]) == 0
    (run,) = runs.read(path)
    path.unlink()
    take = claims.Claims.take
    monkeypatch.setattr(claims.Claims, "take", lambda own, each: records.append(path, run) and take(own, each))
    monkeypatch.setattr(ablate, "train", fail)
    assert main([*words, "--json", str(path), "--only", "first"]) == 0
    assert runs.read(path, fail) == [run] and list(path.parent.iterdir()) == [path]


def test_a_failed_run_leaves_no_claim(words, path, monkeypatch):
    def failed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(ablate, "train", failed)
    assert main([*words, "--json", str(path)]) == 130
    assert list(path.parent.iterdir()) == [path] and path.read_text() == ""


def test_an_unfinished_line_is_told_once_and_its_run_made_again(words, path, capsys):
    assert main([*words, "--json", str(path)]) == 0
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:-100])
    capsys.readouterr()
    assert main([*words, "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert " ".join(out.split()).count("was not finished") == 1
    assert "   2 of 2  seed 0" in out and "   1 of 2  seed 0" not in out
    assert [run["variant"] for run in runs.read(path, fail)] == ["first", "second"]


# -- shards


@pytest.mark.parametrize(("runs_", "n"), [(18, 4), (4, 4), (3, 5), (7, 1)])
def test_shards_are_balanced_and_complete(runs_, n):
    queue = list(range(runs_))
    parts = [ablate.part_of(queue, i, n) for i in range(1, n + 1)]
    assert [run for part in parts for run in part] == queue
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_shards_go_to_files_of_their_own_and_are_merged(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in (1, 2, 3):
        assert main([*words, "--runs", "2", "--shard", f"{i}/3"]) == 0
    assert "part 3 of 3: 2 runs" in capsys.readouterr().out
    files = sorted(Path("runs").iterdir())
    assert [path.name for path in files] == [f"ASKED.{i}-of-3.jsonl" for i in (1, 2, 3)]
    trained = [[(run["seed"], run["variant"]) for run in runs.read(path)] for path in files]
    assert trained == [[(0, "first")], [(0, "second")], [(1, "first"), (1, "second")]]
    assert main(["merge", *map(str, reversed(files)), "-o", "all.jsonl"]) == 0
    assert main([*words, "--runs", "2", "--json", "all.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "n = 2;" in out and " of 4  seed" not in out


@pytest.mark.parametrize("text", ["0/2", "3/2", "1/0", "1", "1/2/3", "-1/2", "a/b", "1.0/2", ""])
def test_a_bad_shard_is_one_line(words, capsys, text):
    assert main([*words, f"--shard={text}"]) == 2
    err = capsys.readouterr().err
    assert "expected I/N with 1 <= I <= N, such as 2/8" in err and err.count("\n") == 1


# -- processes at the same time


def ablate_in_a_process(arguments: list[str], out: Path = Path(os.devnull)) -> None:
    # sums are cut up by the number of threads
    torch.set_num_threads(1)
    sys.stdout = open(out, "w", buffering=1)  # noqa: SIM115
    os._exit(main(arguments))


def ablate_with_others(arguments: list[str], folder: Path, number: int) -> None:
    """Ends with 3 where three processes never train at the same time."""
    train, met = ablate.train, folder / f"{number}.met"

    def meet(*given, **options):
        met.touch()
        for _ in range(6000):
            if len(list(folder.glob("*.met"))) == 3:
                return train(*given, **options)
            time.sleep(0.01)
        os._exit(3)

    ablate.train = meet
    ablate_in_a_process(arguments, folder / f"{number}.txt")


def test_three_train_at_the_same_time_and_each_run_once(words, path, tmp_path):
    arguments = [*words, "--json", str(path), "--runs", "3"]
    processes = [started(ablate_with_others, arguments, tmp_path, number) for number in range(3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    said = [(tmp_path / f"{number}.txt").read_text() for number in range(3)]
    lines = [line for text in said for line in text.splitlines() if " of 6  seed " in line]
    assert sorted(int(line.split()[0]) for line in lines) == [1, 2, 3, 4, 5, 6]
    assert len(trained(path)) == 6 and all("n = 3;" in text for text in said)


def trained(path: Path) -> dict:
    """What each run on file came to; nothing else is in its folder, nothing in it is amiss."""
    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes().endswith(b"\n")
    found = records.read(path, note=fail)
    values = {(run["variant"], run["seed"]): (run["accuracy"], run["epoch_losses"]) for run in found}
    assert len(values) == len(found)
    return values


def test_killed_at_random_moments(words, path, tmp_path):
    """Three processes at a time, of which one, two or all are killed, and begin again."""
    moments, seeds = random.Random(0), "6"

    def begun(file: Path) -> BaseProcess:
        return started(ablate_in_a_process, [*words, "--json", str(file), "--runs", seeds])

    (tmp_path / "whole").mkdir()
    whole = tmp_path / "whole" / "all.jsonl"
    # what processes are forked from imports its own first
    started(time.sleep, 0).join()
    alone, began = begun(whole), time.perf_counter()
    alone.join()
    assert alone.exitcode == 0
    lasted, wanted, kills = time.perf_counter() - began, trained(whole), 0
    assert len(wanted) == 2 * int(seeds)

    processes = [begun(path) for _ in range(3)]
    while kills < KILLS:
        time.sleep(moments.uniform(0, lasted / 2))
        victims = [each for each in processes if each.exitcode is None]
        if not victims:
            # they came to their end before: once more from the start
            assert [each.exitcode for each in processes] == [0, 0, 0]
            assert trained(path) == wanted
            path.unlink()
            processes = [begun(path) for _ in range(3)]
            continue
        for victim in moments.sample(victims, min(len(victims), moments.choice((1, 1, 2, 3)))):
            victim.kill()
            victim.join()
            # unless it ended just before
            if victim.exitcode == -signal.SIGKILL:
                kills += 1
                processes[processes.index(victim)] = begun(path)
    for process in processes:
        process.join()
    assert [each.exitcode for each in processes] == [0, 0, 0]
    assert trained(path) == wanted
