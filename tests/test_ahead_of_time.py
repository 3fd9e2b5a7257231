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
import json, re, sys
import torch
import kernels
from kernels import _ahead_of_time, _cases, _launch

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
            op=case.op, case=case.label, dtype=str(dtype), target=target, kernel=r.kernel, registers=r.registers,
            spills=r.spills, stack=r.stack, shared=r.shared, wide_loads=wide_loads, wide_stores=wide_stores,
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
        rows += [json.loads(line) for line in out.splitlines()]
    return rows


def test_every_kernel_compiles_for_every_target(report):
    per_target = {}
    for row in report:
        per_target.setdefault((row["dtype"], row["target"]), set()).add((row["op"], row["kernel"]))
    expected = per_target[("torch.float16", "sm_90")]
    assert len(expected) >= 20
    for dtype, target in JOBS:
        got = per_target[(f"torch.{dtype}", target)]
        # a kernel shared by two ops is listed under whichever came first in its worker
        assert {kernel for _, kernel in got} == {kernel for _, kernel in expected}, (dtype, target)


def test_no_register_is_spilled(report):
    spilled = [row for row in report if row["target"].startswith("sm_") and (row["spills"] or row["stack"])]
    assert not spilled, "\n".join(map(str, spilled))


def test_large_tensors_are_moved_in_16_byte_pieces(report):
    """What reads and writes activations of channel counts divisible by 8 does so 16 bytes at a time."""
    for row in report:
        if not row["target"].startswith("sm_"):
            continue
        if row["op"] in ("excite_norm_act_add", "squeeze_excite") and row["kernel"] in ("_fwd_kernel", "_bwd_kernel"):
            assert row["wide_loads"] and row["wide_stores"], row
        if row["op"].startswith("whiten") and row["kernel"] == "_fwd_kernel":
            assert row["wide_stores"], row


def test_patch_products_run_on_tensor_cores(report):
    for row in report:
        if row["dtype"] == "torch.float16" and row["op"] == "whiten_project_norm_act" and "finish" not in row["kernel"]:
            assert row["tensor_core"], row
