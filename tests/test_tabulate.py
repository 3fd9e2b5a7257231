"""The committed tables are what the committed JSON files say, and damaged files are refused by name."""

import json
import re
import shlex
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


def write_runs(copy: Path, name: str, runs: list[dict], plan: str = "recipes") -> None:
    (copy / "results" / name).write_text("".join(json.dumps({**run, "plan": plan}) + "\n" for run in runs))


@pytest.fixture
def empty(copy):
    """`copy` without a result."""
    shutil.rmtree(copy / "results")
    (copy / "results").mkdir()
    return copy


def pages(copy: Path) -> list[str]:
    assert main(["tabulate", "--root", str(copy)]) == 0
    assert main(["tabulate", "--root", str(copy), "--check"]) == 0
    return [(copy / "results" / name).read_text() for name in ("README.md", "search.md")]


GPU = {"device": "gpu", "threads": 16, "power_limit": "700 W", "torch": "4", "triton": "5", "commit": "c0ffee"}
COMMAND = ["blink", "ablate", "recipes", "--json", "results/there.jsonl"]


def test_files_of_two_machines_make_one_table_and_a_verdict(empty):
    """The second machine's accuracies are 5 points higher, of which the differences know nothing."""
    held_out = {"cross_entropy": 0.3, "temperature": 1.0, "margin": 2.0}
    lower = [{**held_out, "cross_entropy": 0.29 - seed / 1e3} for seed in range(3)]
    here = [record("air", 0, 0.80, held_out=held_out), record("blink", 0, 0.81, held_out=lower[0])]
    there = [
        record(*run, environment=GPU, command=COMMAND, held_out=held)
        for run, held in (
            (("air", 1, 0.85), held_out),
            (("air", 2, 0.85), held_out),
            (("blink", 1, 0.861), lower[1]),
            (("blink", 2, 0.862), lower[2]),
        )
    ]
    write_runs(empty, "here.jsonl", here)
    write_runs(empty, "there.jsonl", there)
    readme, search = pages(empty)
    head, origin, _ = readme.split("\n## recipes\n\n")[1].split("\n\n")[1:4]
    assert head.startswith("[here.jsonl](here.jsonl), [there.jsonl](there.jsonl): n = 3; d f,")
    assert head.endswith("; 2 runs on cpu, 1 thread, torch 2, triton 3; 4 runs on gpu, 700 W, torch 4, triton 5")
    assert origin == (
        "`blink ablate recipes --json results/there.jsonl`, not recorded of 2 runs; seeds 0 to 2; "
        "commit c0ffee, commit not recorded."
    )
    assert "| blink | 3 | 84.43 +-7.39 | +1.10 +-0.25 | - | 1.00x +-0.00 | 0.0020 |" in readme
    assert (
        "| [recipes](here.jsonl) [2](there.jsonl) | blink | 3 | d, fp32, reference | 0.5 x, whole | 0.0020 "
        "| +1.10 +-0.25 | -0.0110 +-0.0025 | better |"
    ) in search


def test_the_log_names_what_is_open_without_figures(empty):
    air, blink = [record("air", s, 0.8) for s in (0, 1)], [record("blink", s, 0.7 + s) for s in (0, 1, 2)]
    for name, runs, row in (
        ("two.jsonl", [*air, *blink[:2]], "| 2 | d, fp32, reference | 0.5 x, whole | 0.0020 | - | - | open (n = 2) |"),
        ("one.jsonl", [air[0], blink[0]], "| 1 | d, fp32, reference | 0.5 x, whole | 0.0020 | - | - | open (n = 1) |"),
        ("unpaired.jsonl", [air[0], blink[2]], "| open (n = 0) |"),
        ("alone.jsonl", blink, "| open (n = 0) |"),
    ):
        write_runs(empty, name, runs)
        search = pages(empty)[1]
        (line,) = [line for line in search.splitlines() if f"({name})" in line]
        assert f"[recipes]({name}) | blink |" in line and line.endswith(row)
        (empty / "results" / name).unlink()
    left = pages(empty)[1].split("without a run on file:\n")[1]
    assert "- recipes: 'air', 'blink'\n" in left and "'SGD in Muon's place'" not in left.split("- whitening")[0]


def test_the_log_compares_with_the_first_of_the_plan_alone(empty):
    """Without runs of that, two others that differ clearly are both open; results/README.md compares them."""
    runs = [record(f"reduction {r}", s, 0.5 + r / 100 + s * r / 1e4) for r in (4, 8) for s in (0, 1, 2)]
    write_runs(empty, "se.jsonl", runs, "se")
    readme, search = pages(empty)
    assert "| reduction 8 | 3 | 58.08 +-0.20 | +4.04 +-0.10 |" in readme
    assert [line.split(" | ")[-3:] for line in search.splitlines() if "(se.jsonl)" in line] == 2 * [
        ["-", "-", "open (n = 0) |"]
    ]


def test_the_log_links_to_what_is_there():
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / "results" / "search.md").read_text()):
        assert (ROOT / "results" / target).is_file(), target


def test_pages_do_not_depend_on_the_order_of_directory_entries(empty, monkeypatch):
    write_runs(empty, "a.jsonl", [record("air", 0, 0.8), record("blink", 0, 0.81)])
    write_runs(empty, "b.jsonl", [record(name, 0, 0.8, environment=GPU) for name in ("blink", "air")])
    first, entries = pages(empty), Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: reversed(sorted(entries(self, pattern))))
    assert pages(empty) == first


def test_a_stale_log_is_noticed(copy, capsys):
    search = copy / "results" / "search.md"
    search.write_text(search.read_text() + "typed in\n")
    assert main(["tabulate", "--root", str(copy), "--check"]) == 1
    assert capsys.readouterr().err == f"{search} is stale: run blink tabulate\n"


def test_every_training_and_profile_names_its_command():
    text = (ROOT / "results" / "README.md").read_text()
    for path in sorted((ROOT / "results").glob("*.json")):
        content = json.loads(path.read_text())
        if content.get("summary") or "profile" in content:
            assert f"- {path.stem}: `{shlex.join(content['command'])}`" in text


def test_runs_of_a_plan_that_is_gone_are_named(copy, capsys):
    (copy / "results" / "old.jsonl").write_text(json.dumps(record("air", 0, 0.8)))
    assert main(["tabulate", "--root", str(copy)]) == 2
    err = capsys.readouterr().err
    assert "old.jsonl holds runs of 'p', which is no plan" in err and err.count("\n") == 1


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
    where["command"] = ["blink", "race", "peer=here"]
    found = [
        block("blink", 0, [1.0, 1.2], **where, seed=4),
        block("peer", 0, [2.0, 2.2], note="peer is a stand-in", **where),
    ]
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
        assert "\n`blink race peer=here`; seeds 4, 5; commit not recorded.\n" in text
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
