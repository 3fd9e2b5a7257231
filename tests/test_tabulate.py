"""The committed tables are what the committed JSON files say, and damaged files are refused by name."""

import json
import shutil
from pathlib import Path

import pytest

from blink.__main__ import main
from blink.experiments import tabulate
from tests.test_ablate import record
from tests.test_race import block

ROOT = Path(tabulate.__file__).resolve().parent.parent


@pytest.fixture
def copy(tmp_path):
    """README.md and results/ of this checkout, to be changed."""
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "results", tmp_path / "results")
    return tmp_path


def test_committed_tables_are_up_to_date(capsys):
    assert main(["tabulate", "--check"]) == 0, capsys.readouterr().err


def test_a_new_result_makes_the_tables_stale_until_they_are_made_again(copy, capsys):
    (first,) = sorted((copy / "results").glob("hlb-*.json"))[:1]
    content = json.loads(first.read_text())
    content["summary"]["accuracy"]["mean"] = 0.1234
    (copy / "results" / "another.json").write_text(json.dumps(content))
    assert main(["tabulate", "--root", str(copy), "--check"]) == 1
    assert "README.md is stale" in capsys.readouterr().err
    assert main(["tabulate", "--root", str(copy)]) == 0
    assert main(["tabulate", "--root", str(copy), "--check"]) == 0
    assert "0.1234" in (copy / "results" / "README.md").read_text()


@pytest.mark.parametrize("text", ["{", "[]", '{"summary": {"accuracy": 1}}', '{"profile": {}}'])
def test_a_damaged_file_is_named_in_one_line(copy, capsys, text):
    (copy / "results" / "bad.json").write_text(text)
    assert main(["tabulate", "--root", str(copy)]) == 2
    err = capsys.readouterr().err
    assert "bad.json" in err and err.count("\n") == 1


def test_other_json_files_are_left_out(copy):
    (copy / "results" / "bench.json").write_text('{"rows": []}')
    assert main(["tabulate", "--root", str(copy), "--check"]) == 0


def test_runs_of_a_plan_become_its_table_where_they_decide_something(copy):
    for accuracies, shown in (((0.91, 0.92), False), ((0.9301, 0.9303), True)):
        runs = [record("air", seed, 0.9123 + seed / 1e4, 10.0) for seed in (0, 1)]
        runs += [record("blink", seed, accuracies[seed], 10.0) for seed in (0, 1)]
        lines = [json.dumps({**run, "plan": "recipes"}) for run in runs]
        (copy / "results" / "recipes-there.jsonl").write_text("\n".join(lines))
        assert main(["tabulate", "--root", str(copy)]) == 0
        text = (copy / "results" / "README.md").read_text().split("[recipes-there.jsonl]")[1]
        text = text.split("\n## ")[0].split("\n[")[0]
        assert "10 training and 5 test images" in text
        assert ("| blink | 2 | 93.02 " in text) == ("| air | 2 |" in text) == shown
        assert ("Too few runs to tell from 'air': blink." in text) != shown


def test_a_run_that_was_not_finished_or_is_there_twice_is_noted(copy, capsys):
    shutil.rmtree(copy / "results")
    (copy / "results").mkdir()
    runs = [{**record("air", seed, accuracy), "plan": "recipes"} for seed, accuracy in ((0, 0.8), (1, 0.9), (1, 0.1))]
    text = "".join(json.dumps(run) + "\n" for run in runs)
    (copy / "results" / "there.jsonl").write_text(text + json.dumps(runs[0])[:-5])
    assert main(["tabulate", "--root", str(copy)]) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert "line 4 of" in first and "was not finished" in first
    assert "holds seed 1 of 'air' twice; the first counts" in second
    assert "n = 2; d f" in (copy / "results" / "README.md").read_text()


def write_race(copy: Path, name: str, device: str) -> None:
    where = {"environment": {"device_type": device}}
    found = [block("blink", 0, [1.0, 1.2], **where), block("peer", 0, [2.0, 2.2], note="peer is a stand-in", **where)]
    (copy / "results" / name).write_text("".join(json.dumps(record) + "\n" for record in found))


def test_a_race_becomes_its_table_and_one_on_a_gpu_takes_the_first_screen(copy):
    """One on a CPU is shown there until then."""
    for path in (copy / "results").glob("race-*.jsonl"):
        path.unlink()
    peer = "| peer | 2 | 94.00 +-0.00 | 2.100 | 2.200 | 1.83 | 0.2000 |"
    shown = []
    for name, device in (("race-some.jsonl", "cpu"), ("race-there.jsonl", "cuda")):
        write_race(copy, name, device)
        assert main(["tabulate", "--root", str(copy)]) == 0
        text = (copy / "results" / "README.md").read_text()
        assert "# Races" in text and f"[{name}]({name})" in text
        record = (copy / "README.md").read_text().split("<!-- record -->")[1].split("<!-- end -->")[0]
        for found in (text, record):
            assert peer in found and "Note: peer is a stand-in." in found
        assert "again s" in text and "again s" not in record
        shown.append(["results/race-some.jsonl" in record, "results/race-there.jsonl" in record])
    assert shown == [[True, False], [False, True]]


@pytest.mark.parametrize("text", ["{\n", "[]", '{"plan": "recipes"}', '{"plan": "unknown"}'])
def test_a_damaged_file_of_runs_is_named_in_one_line(copy, capsys, text):
    (copy / "results" / "bad.jsonl").write_text(text)
    assert main(["tabulate", "--root", str(copy)]) == 2
    err = capsys.readouterr().err
    assert "bad.jsonl" in err and err.count("\n") == 1


def test_a_readme_without_marks_is_refused(copy, capsys):
    (copy / "README.md").write_text("# nothing\n")
    assert main(["tabulate", "--root", str(copy)]) == 2
    assert "<!-- record -->" in capsys.readouterr().err
