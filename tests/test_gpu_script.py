"""`.ci/gpu` on a machine without a GPU: its commands are ones that exist, and each part ends within ten minutes.

`timeout` and Python are stand-ins here that note what they are asked for.
"""

import os
import subprocess
from pathlib import Path

import pytest

from blink.__main__ import parse as parse_command

ROOT = Path(__file__).resolve().parent.parent
PARTS = [line.split("()")[0].removeprefix("part_") for line in (ROOT / ".ci" / "gpu").read_text().splitlines()
         if line.startswith("part_")]  # fmt: skip

TIMEOUT = """#!/bin/bash
[ "$1" = -k ] && grace=$2 && shift 2
printf '%s\\x1f' "$grace" "$@" $'\\x1e' >>"$NOTED"
shift
LIMITED=1 exec "$@"
"""
PYTHON = """#!/bin/bash
[ -n "$LIMITED" ] || exit 99
case "$*" in
*--collect-only*) printf '%s\\n' 'tests/test_op_contract.py::test_a[x y-float32]' \\
    'tests/test_whiten.py::test_matches_float64[1x2-float32]' 'tests/test_whiten.py::test_matches_float64[3-float32]' \\
    'tests/test_whiten.py::test_matches_float64[3-float16]' 'tests/test_until.py::test_b' '5 tests collected' ;;
*'-m pytest'*)
    for name; do [[ $name != tests/* ]] || echo "$name" >>"$NOTED.tests"; done
    echo 'FAILED tests/test_whiten.py::test_c'
    echo '1 failed, 2 passed, 1 skipped in 3.21s'
    exit 1 ;;
*) echo one; echo 'the last line' ;;
esac
[[ -z $FAILING || $* != *"$FAILING"* ]]
"""


@pytest.fixture
def call(tmp_path):
    """Calls a part: its exit code, its output, what ran under which limit."""
    for name, text in (("timeout", TIMEOUT), ("python3", PYTHON)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(*arguments, failing=""):
        env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NOTED": str(tmp_path / "noted")}
        env |= {"FAILING": failing}
        env.pop("PYTHON", None)
        done = subprocess.run([ROOT / ".ci" / "gpu", *arguments], env=env, capture_output=True, text=True)
        noted = tmp_path / "noted"
        records = noted.read_text().split("\x1e\x1f")[:-1] if noted.exists() else []
        return done.returncode, done.stdout + done.stderr, [record.split("\x1f")[:-1] for record in records]

    return run


def parse(command: list[str]) -> None:
    """By the command's own parser; raises UserError for what it does not know."""
    flag, module, *rest = command
    assert flag == "-m" and module in ("blink", "pytest")
    if module == "blink":
        name, *arguments = rest
        parse_command(name, arguments)


@pytest.mark.parametrize("part", PARTS)
def test_a_parts_commands_exist_and_end_within_ten_minutes(part, call, tmp_path):
    code, said, noted = call(part, str(tmp_path / "out"), "nowhere", "airbench94_muon=there")
    assert code == (1 if part in ("ops", "tests") else 0), said
    assert noted and sum(int(limit) for _, limit, *_ in noted) + int(noted[-1][0]) < 590
    for _, _, *command in noted:
        if command[0].endswith("python3"):
            parse(command[1:])
    head, *rows = said[said.rindex("\n\n") :].strip().splitlines()
    assert head.split()[0] == part and len(rows) == sum("--collect-only" not in command for command in noted)


def test_every_part_is_explained_and_in_the_docs(call):
    code, said, _ = call("nothing", "out")
    assert code == 2 and all(f"\n  {part} " in said for part in PARTS)
    docs = (ROOT / "docs" / "benchmarks.md").read_text()
    assert all(f" {part}" in docs[docs.index("for part in ops") :][:400] for part in PARTS)


def test_tests_run_side_by_side_and_are_counted(call, tmp_path):
    code, said, _ = call("ops", str(tmp_path / "out"))
    chosen = sorted((tmp_path / "noted.tests").read_text().splitlines())
    # of a file's cases the first in each dtype
    assert chosen == [
        "tests/test_op_contract.py::test_a[x y-float32]",
        "tests/test_whiten.py::test_matches_float64[1x2-float32]",
        "tests/test_whiten.py::test_matches_float64[3-float16]",
    ]
    assert "FAILED tests/test_whiten.py::test_c" in said
    assert said.splitlines()[-1].split()[:2] == ["ops", "123"]
    assert said.rstrip().endswith("3 tests: 2 passed, 1 failed, 0 errors, 1 skipped") and code == 1
    assert "1 failed, 2 passed" in (tmp_path / "out" / "ops.log").read_text()


def test_a_failure_is_told_and_ends_nothing(call, tmp_path):
    code, said, noted = call("train", str(tmp_path / "out"), failing="--recipe air")
    table = [line.split()[:2] for line in said.splitlines()[-4:]]
    assert code == 1 and len(noted) == 4
    assert table == [
        ["blink-fused-gpu", "0"],
        ["blink-reference-gpu", "0"],
        ["air-fused-gpu", "1"],
        ["hlb-fused-gpu", "0"],
    ]
