"""A launch, as far as it goes without a device: through Triton's own binder, to the code that was compiled ahead."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blink.kernels import launching
from blink.training.recipes import RECIPES

ROOT = Path(__file__).resolve().parent.parent


def test_every_launch_passes_tritons_binder_and_runs_what_is_compiled_ahead():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.bound_launches"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["found"] == {}
    # more than the cases alone have
    assert report["specializations"] > 400
    assert report["recipes"] == sorted(f"recipe {name}" for name in RECIPES)


class Kernel:
    __name__ = "_some_kernel"

    def __init__(self, *arg_names: str):
        self.arg_names = arg_names

    def __getitem__(self, grid):
        return lambda *arguments, **keywords: None


@pytest.mark.parametrize("name", ["params", "options", "specialization", "backend", "specialize_impl", "num_warps"])
def test_names_that_triton_uses_itself_are_refused(name):
    with pytest.raises(ValueError, match=f"_some_kernel has an argument named '{name}', which Triton"):
        launching.check_argument_names(Kernel("x_ptr", name))
    launching.check_argument_names(Kernel("x_ptr", "param_ptrs"))
