"""blink merge: the union of files of runs, each run once; inputs and what is no file of runs stay as they are."""

import json
import os

import pytest

from blink.__main__ import main
from blink.experiments import records, runs
from blink.experiments.claims import Claims
from tests.test_ablate import record


@pytest.fixture
def files(tmp_path):
    """Two files: the second begins with a run of the first, with another accuracy."""
    here = [record("base", 1, 0.7), record("base", 0, 0.8), record("other", 0, 0.9)]
    there = [record("base", 1, 0.1), record("other", 1, 0.6), record("base", 0, 0.5, width=1.0)]
    paths = [tmp_path / "here.jsonl", tmp_path / "there.jsonl"]
    for path, written in zip(paths, (here, there)):
        path.write_bytes(b"".join(map(records.as_line, written)))
    return paths


def merge(*arguments) -> int:
    return main(["merge", *map(str, arguments)])


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_run_once_in_a_stable_order(files, tmp_path, capsys):
    before, out = contents(tmp_path), tmp_path / "all.jsonl"
    assert merge(*files, "-o", out) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}: 5 runs of 2 files; duplicates left out: 1\n" and printed.err == ""
    found = [(run["width"], run["seed"], run["variant"], run["accuracy"]) for run in runs.read(out)]
    half = [(0.5, 0, "base", 0.8), (0.5, 0, "other", 0.9), (0.5, 1, "base", 0.7), (0.5, 1, "other", 0.6)]
    assert found == [*half, (1.0, 0, "base", 0.5)]
    # whatever the order of the files, but for whose run counts
    assert merge(*reversed(files), "-o", tmp_path / "turned.jsonl") == 0
    turned = runs.read(tmp_path / "turned.jsonl")
    assert [runs.identity(run) for run in turned] == [runs.identity(run) for run in runs.read(out)]
    assert turned[2]["accuracy"] == 0.1
    # again, and with itself, it stays as it is
    assert merge(out, out, *files, "-o", tmp_path / "again.jsonl") == 0
    assert (tmp_path / "again.jsonl").read_bytes() == out.read_bytes()
    assert {name: content for name, content in contents(tmp_path).items() if name in before} == before


def test_what_a_file_has_twice_or_not_whole_is_noted(files, tmp_path, capsys):
    records.append(files[0], record("base", 0, 0.2))
    with open(files[0], "ab") as file:
        file.write(b'{"plan": "p", "var')
    before = files[0].read_bytes()
    assert merge(files[0], "-o", tmp_path / "all.jsonl") == 0
    err = capsys.readouterr().err
    assert "line 5 of" in err and "was not finished" in err and "holds seed 0 of 'base' twice" in err
    assert [run["accuracy"] for run in runs.read(tmp_path / "all.jsonl")] == [0.8, 0.9, 0.7]
    assert files[0].read_bytes() == before


def refused(capsys, folder, *arguments) -> str:
    """The one line; no file has changed."""
    before = contents(folder)
    assert merge(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and contents(folder) == before
    return printed.err


@pytest.mark.parametrize(
    "text", ["notes\n", "{\n", "[1]\n", json.dumps({"contestant": "blink", "block": 0}), '{"plan": 1}', "\0", "é\n"]
)
def test_what_is_no_file_of_runs_is_refused(files, tmp_path, capsys, text):
    (tmp_path / "bad.txt").write_text(text)
    assert f"line 1 of {tmp_path / 'bad.txt'} is no run" in refused(
        capsys, tmp_path, *files, tmp_path / "bad.txt", "-o", tmp_path / "all.jsonl"
    )


@pytest.mark.parametrize("changes", [{"data": None}, {"data": {}}, {"kernels": []}, {"seed": "x"}, {"environment": 3}])
def test_a_run_that_lacks_what_tells_it_apart_is_refused(files, tmp_path, capsys, changes):
    records.append(files[1], {**record("base", 7, 0.5), **changes})
    assert "holds what is no run" in refused(capsys, tmp_path, *files, "-o", tmp_path / "all.jsonl")


def test_other_inputs_that_cannot_be_merged_are_one_line(files, tmp_path, capsys):
    out = tmp_path / "all.jsonl"
    assert "there is no" in refused(capsys, tmp_path, *files, tmp_path / "missing", "-o", out)
    assert "is no file" in refused(capsys, tmp_path, *files, "/dev/zero", "-o", out)
    assert "required" in refused(capsys, tmp_path, *files)
    assert "could not make the folder" in refused(capsys, tmp_path, *files, "-o", "/dev/null/x")
    (tmp_path / "empty.jsonl").touch()
    assert "no run is in there" in refused(capsys, tmp_path, tmp_path / "empty.jsonl", "-o", out)
    # a part of a plan that held no run
    assert merge(*files, tmp_path / "empty.jsonl", "-o", tmp_path / "with-empty.jsonl") == 0
    capsys.readouterr()
    records.append(files[1], record("base", 3, 0.5, recipe={"name": "changed"}))
    said = refused(capsys, tmp_path, files[1], "-o", out)
    assert "holds runs of 'base' of two recipes or budgets" in said
    (tmp_path / "changed.jsonl").write_bytes(records.as_line(record("base", 3, 0.5, recipe={"name": "changed"})))
    said = refused(capsys, tmp_path, files[0], tmp_path / "changed.jsonl", "-o", out)
    assert "the runs of 'base' in" in said and "are of two recipes or budgets; merge those of one" in said


def test_only_runs_are_overwritten_and_only_when_asked_to(files, tmp_path, capsys):
    out = tmp_path / "all.jsonl"
    out.write_bytes(records.as_line(record("base", 9, 0.5)))
    assert "add --overwrite" in refused(capsys, tmp_path, *files, "-o", out)
    assert "is one of the files to merge" in refused(capsys, tmp_path, *files, "-o", files[1], "--overwrite")
    os.symlink(files[0], tmp_path / "link.jsonl")
    assert "is one of the files" in refused(capsys, tmp_path, *files, "-o", tmp_path / "link.jsonl", "--overwrite")
    for text in ("notes of mine\n", '{"recipe": ', '{"contestant": "blink"}\n'):
        (tmp_path / "notes.txt").write_text(text)
        said = refused(capsys, tmp_path, *files, "-o", tmp_path / "notes.txt", "--overwrite")
        assert "holds other things than runs and is not overwritten" in said
    with Claims(out).take(record("base", 9, 0.5)):
        before = out.read_bytes()
        assert merge(*files, "-o", out, "--overwrite") == 2 and out.read_bytes() == before
        assert "is being added to by blink ablate" in capsys.readouterr().err
    assert merge(*files, "-o", out, "--overwrite") == 0
    assert len(runs.read(out)) == 5
    out.write_text("")
    assert merge(*files, "-o", out, "--overwrite") == 0
