"""Every kernel compiles for GPUs that are not here, at the network's shapes, with no register spilled to memory.

The compiler runs in processes without TRITON_INTERPRET, which would turn the kernels into plain functions; each takes
its share of the cases and prints one JSON line per kernel.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WORKERS = 2
# one dtype for all targets, the others where the first users are
JOBS = [("float16", "sm_80"), ("float16", "sm_90"), ("float16", "sm_100"), ("float16", "gfx942"),
        ("float32", "sm_90"), ("bfloat16", "sm_90")]  # fmt: skip

SCRIPT = """
import importlib, json, pkgutil, re, sys
import torch, triton
import kernels
from kernels import _ahead_of_time, _cases, _launch

def full_name(kernel):
    return kernel.fn.__module__.removeprefix("kernels.") + "." + kernel.__name__

modules = [importlib.import_module("kernels." + m.name) for m in pkgutil.iter_modules(kernels.__path__)]
every = {full_name(v) for m in modules for k, v in vars(m).items()
         if isinstance(v, triton.JITFunction) and k.endswith("_kernel")}
print(json.dumps(sorted(every)))
seen = set()
share, shares = int(sys.argv[1]), int(sys.argv[2])
jobs = [tuple(job.split(":")) for job in sys.argv[3:]]
todo = [(dtype, target, case) for dtype, target in jobs for case in _cases.network_cases()]
for dtype, target, case in todo[share::shares]:
    dtype = getattr(torch, dtype)
    tensors = case.make(torch.device("cpu"), dtype)
    leaves = {k: v.requires_grad_() if k in case.differentiable else v for k, v in tensors.items()}
    with _launch.captured_launches() as launches:
        y = case.call(kernels, leaves, dtype)
        y.backward(torch.empty_like(y))
    for launch in launches:
        source = _ahead_of_time.source_of(launch)
        key = (target, launch.num_warps, source.hash())
        if key in seen:
            continue
        seen.add(key)
        r = _ahead_of_time.compile_launch(launch, target)
        wide_loads = len(re.findall(r"\\bLDG[.\\w]*\\.128|\\bLDGSTS[.\\w]*\\.128|_load_dwordx4", r.assembly))
        wide_stores = len(re.findall(r"\\bSTG[.\\w]*\\.128|_store_dwordx4", r.assembly))
        print(json.dumps(dict(
            op=case.op, case=case.label, dtype=str(dtype), target=target, kernel=full_name(launch.kernel),
            registers=r.registers, spills=r.spills, stack=r.stack, shared=r.shared,
            wide_loads=wide_loads, wide_stores=wide_stores,
            tensor_core=bool(re.search(r"HMMA|HGMMA|UTCHMMA|mfma", r.assembly)))), flush=True)
"""


@pytest.fixture(scope="module")
def report():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    jobs = [f"{dtype}:{target}" for dtype, target in JOBS]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(share), str(WORKERS), *jobs],
            cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for share in range(WORKERS)
    ]  # fmt: skip
    rows = []
    for worker in workers:
        out, err = worker.communicate()
        assert worker.returncode == 0, err[-3000:]
        every, *printed = out.splitlines()
        rows += [json.loads(line) for line in printed]
    return set(json.loads(every)), rows


@pytest.fixture(scope="module")
def cuda_rows(report):
    return [row for row in report[1] if row["target"].startswith("sm_")]


def test_every_kernel_compiles_for_every_target(report):
    """Every jitted *_kernel of the package, so that a new one cannot be left out of the network's cases."""
    every, rows = report
    assert {"whiten._bwd_kernel", "se_gate._weight_grad_kernel", "_norm_act._stats_kernel"} <= every
    for dtype, target in JOBS:
        of_target = [row for row in rows if row["target"] == target]
        # kernels of float32 arguments only do not differ between dtypes, and are compiled once a target
        assert {row["kernel"] for row in of_target} == every, target
        assert any(row["dtype"] == f"torch.{dtype}" for row in of_target), (dtype, target)


def test_no_register_is_spilled(report):
    spilled = [row for row in report[1] if row["spills"] or row["stack"]]
    assert not spilled, "\n".join(map(str, spilled))


def test_large_tensors_are_moved_in_16_byte_pieces(cuda_rows):
    """What reads and writes activations of channel counts divisible by 8 does so 16 bytes at a time."""
    both = {f"{module}._{kernel}_kernel" for module in ("_norm_act", "squeeze_excite") for kernel in ("fwd", "bwd")}
    stores = {"whiten._fwd_kernel", "whiten_project_norm_act._fwd_kernel"}
    checked = set()
    for row in cuda_rows:
        # a pixel of 12 16-bit channels is 24 bytes: no multiple of 16
        if row["kernel"] in both | stores and "-12k" not in row["case"]:
            checked.add(row["kernel"])
            assert row["wide_stores"], row
            assert row["wide_loads"] or row["kernel"] in stores, row
    assert checked == both | stores


def test_patch_products_run_on_tensor_cores(cuda_rows):
    kernels = [f"whiten_project_norm_act._{name}_kernel" for name in ("moments", "fwd", "bwd")]
    rows = [row for row in cuda_rows if row["dtype"] == "torch.float16" and row["kernel"] in kernels]
    assert len(rows) >= len(kernels)
    for row in rows:
        assert row["tensor_core"], row
