"""What an install holds, where the packages are found, and that there is one name for them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("blink", "kernels", "model", "training", "inference", "reporting", "experiments")


def run(*command: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess:
    """A Python process that finds only what is installed, or lies in `path`."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"PYTHONPATH": str(path)} if path else {}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with what an install copies."""
    folder = tmp_path_factory.mktemp("built")
    done = run("setup.py", "-q", "egg_info", "-e", str(folder), "build_py", "--build-lib", str(folder), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder


def test_an_install_holds_every_module(built):
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            inside = file.relative_to(ROOT) if folder == "blink" else Path("blink") / file.relative_to(ROOT)
            assert (built / inside).is_file(), f"setup.py leaves out {inside}"
    sources = [f"kernels/native/{file.name}" for file in (ROOT / "kernels/native").glob("*.?pp")]
    assert len(sources) > 5
    for file in ("py.typed", "reporting/page.html.jinja", *sources):
        assert (built / "blink" / file).is_file()


def test_an_installed_copy_finds_its_own_packages(built, tmp_path):
    code = "import blink.kernels.examine.cases, blink.training.loop, blink.experiments.plans as p; print(p.__file__)"
    done = run("-c", code, cwd=tmp_path, path=built)
    assert done.stdout.strip() == str(built / "blink" / "experiments" / "plans.py"), done.stderr


def test_a_checkout_that_is_not_installed_finds_its_packages():
    done = run("-c", "import blink.kernels, blink.model.network as n; print(n.__file__)", cwd=ROOT)
    assert done.stdout.strip() == str(ROOT / "model" / "network.py"), done.stderr


def test_a_folder_imported_by_its_own_name_is_refused_in_one_line():
    done = run("-c", "import kernels", cwd=ROOT)
    assert done.stderr.strip().splitlines()[-1] == (
        "ImportError: this package is blink.kernels: from blink.kernels import ..."
    )
