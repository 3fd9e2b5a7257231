"""Claims on runs: one process has one, it is void with its owner, and none is left behind."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Barrier, Thread

import pytest

from blink.errors import UserError
from blink.experiments import claims
from blink.processes import alive, start_of
from tests.test_ablate import record


@pytest.fixture
def path(tmp_path):
    """A file of runs in a folder of its own."""
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs" / "all.jsonl"


def change_owner(claim: claims.Claim, **changes) -> Path:
    """Make a claim of this process another's: its file."""
    (path,) = claim._claims.folder.iterdir()
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def dead_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        return process.pid


# -- processes


def test_a_process_is_alive_until_it_ends():
    with subprocess.Popen(["sleep", "60"]) as process:
        start = start_of(process.pid)
        assert start >= start_of(os.getpid()) and alive(process.pid) and alive(process.pid, start)
        # another that has its number now
        assert not alive(process.pid, start - 1)
        process.kill()
        while alive(process.pid):
            time.sleep(0.01)
        # its parent has not asked for it yet, so that its number is still taken
        os.kill(process.pid, 0)
    assert not alive(process.pid) and start_of(process.pid) is None


# -- claims


def test_a_claim_is_one_processs_and_goes_with_its_folder(path):
    first, second = (claims.Claims(path) for _ in range(2))
    with first.take(record("base", 0, 0.5)) as claim:
        assert claim.run["variant"] == "base"
        assert second.take(record("base", 0, 0.5)) is None and second.take(record("base", 0, 0.1, seconds=1.0)) is None
        (owner,) = second.owners([record("base", 0, 0.5)])
        assert owner.endswith(f"(process {os.getpid()})") and second.owners([record("base", 1, 0.5)]) == []
        # another seed, another variant, other conditions
        for other in (record("base", 1, 0.5), record("x", 0, 0.5), record("base", 0, 0.5, dtype="bf16")):
            with second.take(other):
                assert len(list(first.folder.iterdir())) == 2
        second.remove_void()
        assert len(list(first.folder.iterdir())) == 1
    assert list(path.parent.iterdir()) == []
    with second.take(record("base", 0, 0.5)):
        pass


def test_a_link_to_the_file_has_its_claims(path):
    path.touch()
    link = path.with_name("link.jsonl")
    link.symlink_to(path)
    with claims.Claims(path).take(record("base", 0, 0.5)):
        assert claims.Claims(link).take(record("base", 0, 0.5)) is None


@pytest.mark.parametrize(
    ("changes", "seconds", "void"),
    [
        ({}, 10_000, False),
        ({"process": dead_process()}, 0, True),
        ({"start": 1}, 0, True),
        # another machine, where no process of this number need be
        ({"machine": "elsewhere", "process": dead_process()}, 0, False),
        ({"machine": "elsewhere"}, claims.VOID_AFTER - 60, False),
        ({"machine": "elsewhere"}, claims.VOID_AFTER + 60, True),
        # a machine that cannot say which it is
        ({"machine": None, "process": dead_process()}, 0, False),
        ({"machine": None}, claims.VOID_AFTER + 60, True),
    ],
)
def test_a_claim_is_void_with_its_owner(path, changes, seconds, void):
    first, second, run = claims.Claims(path), claims.Claims(path), record("base", 0, 0.5)
    claim = first.take(run)
    age(change_owner(claim, **changes), seconds)
    assert (second.owners([run]) == []) == void
    taken = second.take(run)
    assert (taken is not None) == void
    if taken is not None:
        # the next one is valid
        assert first.take(run) is None
        taken.release()
        assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(("seconds", "void"), [(1, False), (60, True)])
def test_a_claim_whose_owner_was_killed_before_it_was_written(path, seconds, void):
    first = claims.Claims(path)
    first.take(record("base", 0, 0.5))
    (file,) = first.folder.iterdir()
    file.write_text("")
    age(file, seconds)
    assert (claims.Claims(path).take(record("base", 0, 0.5)) is not None) == void


def test_what_killed_processes_left_is_removed(path):
    first = claims.Claims(path)
    first.remove_void()
    change_owner(first.take(record("base", 0, 0.5)), process=dead_process())
    with first.take(record("base", 1, 0.5)):
        first.remove_void()
        (left,) = first.folder.iterdir()
        assert json.loads(left.read_text())["seed"] == 1
    first.folder.mkdir()
    first.remove_void()
    assert not first.folder.exists()


def test_an_owner_that_was_taken_for_dead_leaves_the_next_ones_claim(path):
    first, run = claims.Claims(path), record("base", 0, 0.5)
    with first.take(run) as old:
        age(change_owner(old, machine="elsewhere"), 2 * claims.VOID_AFTER)
        new = first.take(run)
    assert new is not None and first.take(run) is None
    new.release()
    assert list(path.parent.iterdir()) == []


def test_of_many_that_find_a_claim_void_one_takes_it(path):
    run, barrier, dead = record("base", 0, 0.5), Barrier(8), dead_process()
    for _ in range(25):
        change_owner(claims.Claims(path).take(run), process=dead)
        taken = []

        def take(taken=taken):
            own = claims.Claims(path)
            barrier.wait()
            taken.append(own.take(run))

        threads = [Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (one,) = filter(None, taken)
        one.release()
        assert list(path.parent.iterdir()) == []


def test_a_claim_is_kept_fresh(path, monkeypatch):
    monkeypatch.setattr(claims, "_TOUCHED_EVERY", 0.01)
    first = claims.Claims(path)
    with first.take(record("base", 0, 0.5)):
        (file,) = first.folder.iterdir()
        age(file, 1000)
        while file.stat().st_mtime < time.time() - 500:
            time.sleep(0.01)


def test_a_disk_that_takes_no_claim_is_one_line(path):
    path.with_name("all.jsonl.claims").touch()
    with pytest.raises(UserError, match=r"could not claim a run in .*all\.jsonl\.claims \(Not a directory\)"):
        claims.Claims(path).take(record("base", 0, 0.5))
