"""Every kernel compiles for GPUs that are not here, at the network's shapes, with no register spilled to memory.

The report is made by `blink inspect`, in processes without TRITON_INTERPRET, which would turn the kernels
into plain functions; what the report computes from numbers and text is tested here directly.
"""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import triton

from blink import kernels
from blink.__main__ import main
from blink.kernels.examine import ahead_of_time, compile_report
from blink.kernels.examine.ahead_of_time import innermost_bytes
from blink.kernels.examine.cases import network_cases
from blink.kernels.examine.machine_code import PROCESSORS, count_amdgcn, count_sass, fused_shuffles, occupancy
from blink.kernels.launching import interpreting
from blink.kernels.registry import OPS

ROOT = Path(__file__).resolve().parent.parent
# all shapes in one dtype where the first users are; the other dtypes there, and the other targets, at each kind of
# tile; for GPUs with less shared memory the ops that take most of it
CALLS = [
    ("float16", "sm_90"),
    ("float32,bfloat16", "sm_90", "--tiles"),
    ("float16", "sm_80,sm_100,gfx942", "--tiles"),
    ("float16", "sm_75,sm_86,sm_89,sm_120", "--tiles", "se_gate", "muon"),
]
JOBS = [
    (dtype, target)
    for dtypes, targets, *options in CALLS
    if not set(options) & set(OPS)
    for dtype in dtypes.split(",")
    for target in targets.split(",")
]


def compiling(*command: str) -> subprocess.CompletedProcess:
    """A Python process in which kernels can be compiled."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """(what was printed, the JSON) of each call."""
    folder = tmp_path_factory.mktemp("reports")
    made = []
    for dtypes, targets, *options in CALLS:
        path = folder / "report.json"
        done = compiling(
            "-m",
            "blink",
            "inspect",
            "--dtype",
            dtypes,
            "--target",
            targets,
            "--json",
            str(path),
            "--overwrite",
            *options,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        made.append((done.stdout, json.loads(path.read_text())))
    return made


@pytest.fixture(scope="module")
def rows(reports):
    return [row for _, report in reports for row in report["rows"]]


@pytest.fixture(scope="module")
def cuda_rows(rows):
    return [row for row in rows if row["target"].startswith("sm_")]


def every_kernel() -> set[str]:
    """Every jitted *_kernel of the package, as module._name_kernel."""
    found = set()
    for module in pkgutil.iter_modules(kernels.__path__):
        if not module.ispkg:
            for name, value in vars(importlib.import_module(f"blink.kernels.{module.name}")).items():
                if name.endswith("_kernel") and hasattr(value, "fn"):
                    found.add(f"{value.fn.__module__.removeprefix('blink.kernels.')}.{name}")
    return found


def test_every_kernel_compiles_for_every_target(rows):
    """Every jitted *_kernel of the package, so that a new one cannot be left out of the network's cases."""
    every = every_kernel()
    assert {"whiten._bwd_kernel", "se_gate._weight_grad_kernel", "_batch_norm._stats_kernel"} <= every
    for dtype, target in JOBS:
        of_target = [row for row in rows if row["target"] == target]
        # kernels of float32 arguments only do not differ between dtypes, and are compiled once a target
        assert {row["kernel"] for row in of_target} == every, target
        assert any(row["dtype"] == dtype for row in of_target), (dtype, target)


def test_no_register_is_spilled(rows):
    """To memory, that is: on gfx942 the compiler parks scalar registers in vector ones, without traffic."""
    allowed = compile_report.allowed_spills("sm_90", triton.__version__)
    held = [row for row in rows if row["target"] != "sm_75"]
    spilled = [row for row in held if row["local_loads"] + row["local_stores"] > allowed]
    assert not spilled, "\n".join(map(str, spilled))


def test_one_version_is_held_to_no_spill_and_others_to_few():
    assert [compile_report.allowed_spills("sm_90", version) for version in ("3.8.0", "3.6.0", "3.80.0")] == [0, 16, 16]
    assert (
        compile_report.allowed_spills("sm_75", "3.8.0")
        == compile_report.allowed_spills("gfx942", "3.8.0")
        == float("inf")
    )


def test_every_kernel_fits_the_shared_memory_of_smaller_gpus(rows, reports):
    """Products without tensor cores (sm_75), and blocks that may use 64 or 99 KB."""
    smaller = [row for row in rows if row["target"] in ("sm_75", "sm_86", "sm_89", "sm_120")]
    assert all(row["shared"] <= row["shared_limit"] <= 99 * 1024 for row in smaller)
    assert all(row["shared"] for row in smaller if row["kernel"] == "se_gate._fwd_kernel")
    assert "sm_75: no tensor-core path" in reports[-1][0]


def test_tiles_leave_out_sizes_only(rows):
    """Of a kernel all kinds of tile are compiled, and fewer shapes than without."""
    count = Counter((row["target"], row["dtype"], row["kernel"]) for row in rows)
    for (target, dtype, kernel), found in count.items():
        if dtype == "float16":
            assert found <= count["sm_90", dtype, kernel], (target, kernel)
    # of many segments, of images with a gate or a squeeze, and of few segments
    assert count["sm_80", "float16", "_batch_norm._fwd_kernel"] == 4


def test_large_tensors_are_moved_in_16_byte_pieces(cuda_rows):
    """What reads and writes activations of channel counts divisible by 8 does so 16 bytes at a time."""
    both = {f"{module}._{kernel}_kernel" for module in ("_batch_norm", "squeeze_excite") for kernel in ("fwd", "bwd")}
    stores = {"whiten._fwd_kernel", "whiten_project_norm_act._fwd_kernel"}
    checked = set()
    for row in cuda_rows:
        # a pixel of 12 16-bit channels is 24 bytes: no multiple of 16
        if row["kernel"] in both | stores and (row["kernel"] != "whiten._fwd_kernel" or "-12x3x" not in row["case"]):
            checked.add(row["kernel"])
            assert row["wide_stores"], row
            assert row["wide_loads"] or row["kernel"] in stores, row
    assert checked == both | stores


def test_patch_products_run_on_tensor_cores(cuda_rows):
    names = [f"whiten_project_norm_act._{name}_kernel" for name in ("fwd", "bwd")]
    names += [f"_patch_moments._{name}_kernel" for name in ("moments", "image_moments")]
    products = [row for row in cuda_rows if row["dtype"] == "float16" and row["kernel"] in names]
    products = [row for row in products if row["target"] != "sm_75"]
    assert len(products) >= len(names)
    for row in products:
        assert row["tensor_core"], row


def test_every_row_is_complete(rows):
    """Every number of the report, within what the hardware has."""
    # norm_act launches what excite_norm_act_add does, which is compiled once
    assert {row["op"] for row in rows} | {"norm_act"} == {case.op for case in network_cases()}
    for row in rows:
        assert 0 < row["registers"] <= 512 and row["code_bytes"] > 0 and row["num_warps"] > 0, row
        assert 0 < row["occupancy"] <= 1 and row["limited_by"], row
        assert 0 <= row["wide_loads"] <= row["loads"] and 0 <= row["wide_stores"] <= row["stores"], row
        # whatever a kernel computes it reads from somewhere
        assert row["loads"] > 0 and row["fp32"] >= 0 and row["special"] >= 0, row
        assert row["error"] is None


def test_what_is_printed_fits_80_columns(reports):
    for printed, report in reports:
        lines = printed.splitlines()
        assert max(map(len, lines)) <= 80, max(lines, key=len)
        assert lines[-1].startswith(f"{len(report['rows'])} kernels in ")
        assert report["versions"]["torch"] == torch.__version__ and report["offenses"] == []


# registers a thread, shared bytes a block, warps a block -> resident warps of all, by hand
@pytest.mark.parametrize(
    "target, registers, shared, num_warps, expected, limit",
    [
        ("sm_90", 32, 0, 4, 64 / 64, "warps"),
        # 33 registers take 40: 512 // 40 = 12 warps a partition, 48 an SM
        ("sm_90", 33, 0, 4, 48 / 64, "registers"),
        # 512 // 128 = 4 a partition
        ("sm_90", 128, 0, 4, 16 / 64, "registers"),
        # 168 take 168: 3 a partition, 12 an SM, of which 8-warp blocks use 8
        ("sm_80", 168, 0, 8, 8 / 64, "registers"),
        # 40 + 1 KiB a block: 5 blocks of 228 KiB, 4 of 164 KiB
        ("sm_90", 32, 40 * 1024, 4, 20 / 64, "shared"),
        ("sm_80", 32, 40 * 1024, 4, 16 / 64, "shared"),
        # 32 blocks of one warp are half of all warps
        ("sm_90", 32, 0, 1, 32 / 64, "blocks"),
        ("sm_90", 32, 228 * 1024, 4, 0.0, "shared"),
        # 64 registers leave 8 waves a SIMD, which is all that there are; 65 take 72: 7
        ("gfx942", 64, 0, 4, 32 / 32, "warps"),
        ("gfx942", 65, 0, 4, 28 / 32, "registers"),
        ("gfx942", 172, 0, 4, 8 / 32, "registers"),
        ("gfx942", 64, 20 * 1024, 4, 12 / 32, "shared"),
    ],
)
def test_occupancy(target, registers, shared, num_warps, expected, limit):
    assert occupancy(PROCESSORS[target], registers, shared, num_warps) == (expected, limit)


def test_occupancy_by_tensor_memory():
    # 512 columns: 2 blocks of 256
    assert occupancy(PROCESSORS["sm_100"], 32, 0, 4, tensor_memory=256) == (8 / 64, "tensor")


SASS = """
	.section	.text._fwd_kernel,"ax",@progbits
_fwd_kernel:
.text._fwd_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.U8 R8, desc[UR4][R2.64] ;
        /*0030*/             @!UP1 LDG.E.EL.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0040*/                   LDG.E.ENL2.256 R4, R8, desc[UR4][R2.64] ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;
        /*0060*/                   LDGDEPBAR ;
        /*0070*/                   UBLKCP.S.G [UR4], [UR6], UR8 ;
        /*0080*/               @P2 STG.E.128 desc[UR4][R2.64], R4 ;
        /*0090*/                   STG.E desc[UR4][R2.64], R4 ;
        /*00a0*/                   LDL.64 R4, [R1] ;
        /*00b0*/                   STL [R1+0x8], R4 ;
        /*00c0*/                   LDS.128 R4, [R1] ;
        /*00d0*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*00e0*/                   HGMMA.64x32x16.F32 R24, gdesc[UR4], R24 ;
        /*00f0*/                   UTCHMMA tmem[UR11], gdesc[UR4], tmem[UR18], tmem[UR8], idesc[UR9], !UPT ;
        /*0100*/                   HFMA2.MMA R4, -RZ, RZ, 0, 0 ;
        /*0110*/                   FFMA R4, R4, R5, R6 ;
        /*0120*/                   FADD.FTZ R4, R4, R5 ;
        /*0130*/                   FMUL2 R4, R4, R5 ;
        /*0140*/                   FMNMX R4, R4, R5, !PT ;
        /*0150*/                   MUFU.EX2 R4, R4 ;
        /*0160*/                   NOP;
.L_x_1:
"""


def test_counting_sass():
    found = count_sass(SASS)
    assert found.tensor_core == {"HGMMA.64x32x16.F32": 1, "HMMA.16816.F32": 1, "UTCHMMA": 1}
    assert (found.loads, found.wide_loads, found.stores, found.wide_stores) == (6, 5, 2, 1)
    assert (found.local_loads, found.local_stores, found.fp32, found.special) == (1, 1, 3, 1)
    assert found.code_bytes == 23 * 16


AMDGCN = """
_fwd_kernel:                            ; @_fwd_kernel
	s_load_dwordx4 s[4:7], s[0:1], 0x0
	global_load_dwordx4 v[2:5], v1, s[4:5]
	global_load_ubyte v6, v1, s[4:5]
	buffer_load_dwordx4 v[2:5], v4, s[12:15], 0 offen
	buffer_load_dword v12, v4, s[12:15], 0 offen
	global_store_dwordx4 v1, v[2:5], s[4:5]
	buffer_store_short v1, v4, s[12:15], 0 offen
	scratch_load_dwordx4 v[2:5], off, off
	scratch_store_dword off, v2, off
	ds_read_b128 v[2:5], v1
	v_mfma_f32_16x16x16_f16 a[0:3], v[2:3], v[4:5], 0
	v_mfma_f32_16x16x16_f16 a[0:3], v[2:3], v[4:5], a[0:3]
	v_pk_fma_f32 v[2:3], v[2:3], v[4:5], v[6:7]
	v_fmac_f32_e32 v2, v3, v4
	v_add_u32_e32 v2, v3, v4
	v_exp_f32_e32 v2, v2
	s_endpgm
; codeLenInByte = 128
"""


def test_counting_amdgcn():
    found = count_amdgcn(AMDGCN)
    assert found.tensor_core == {"v_mfma_f32_16x16x16_f16": 2}
    assert (found.loads, found.wide_loads, found.stores, found.wide_stores) == (4, 2, 2, 1)
    assert (found.local_loads, found.local_stores, found.fp32, found.special) == (1, 1, 2, 1)
    assert found.code_bytes == 128


PTX = """
	mul.f32 	%r10, %r1, %r2;
	shfl.sync.bfly.b32 	%r11, %r10, 16, 31, -1;
	fma.rn.f32 	%r12, %r1, %r2, %r11;
	shfl.sync.bfly.b32 	%r13|%p1, %r12, 8, 31, -1;
	add.f32 	%r14, %r12, %r13;
	shfl.sync.bfly.b32 	%r20, %r18, 1, 31, -1;
	shfl.sync.bfly.b32 	%r21, %r19, 1, 31, -1;
	mov.b64 	%rd5, {%r20, %r21};
	fma.rn.f64 	%rd6, %rd1, %rd2, %rd5;
	shfl.sync.idx.b32 	%r30, %r29, 3, 31, -1;
	fma.rn.f32 	%r31, %r1, %r2, %r30;
	fma.rn.f32 	%r32, %r14, %r2, 0f00000000;
"""


def test_counting_products_fused_with_what_another_lane_sends():
    """Not what a change of layout sends, nor a product with what came."""
    assert fused_shuffles(PTX) == 2


def test_innermost_dimension_of_memory():
    assert innermost_bytes(torch.empty(2, 24, 4, 4, dtype=torch.float16).to(memory_format=torch.channels_last)) == 48
    assert innermost_bytes(torch.empty(2, 24, 4, 4, dtype=torch.float16)) == 8
    assert innermost_bytes(torch.empty(8, 12, 1, 1)) == 48
    assert innermost_bytes(torch.empty(4, 6)[:, ::2]) == 0


def row_of(**changes) -> dict:
    row = dict(
        op="whiten", case="some", dtype="float16", target="sm_90", kernel="whiten._fwd_kernel", error=None,
        registers=32, spills=0, stack=0, shared=0, shared_limit=99 * 1024, fused_shuffles=0, occupancy=1.0,
        limited_by="warps", tensor_core={}, loads=4, wide_loads=2, stores=1, wide_stores=1, fp32=3, special=0,
        code_bytes=64, wide_argument="x_ptr", narrow_reason=None,
    )  # fmt: skip
    return {**row, **changes}


NARROW = {"wide_loads": 0, "wide_stores": 0}


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, None),
        ({"spills": 17, "stack": 16}, "17 loads and stores of spilled registers, 16 B of stack"),
        ({"spills": 9, "target": "gfx942"}, None),
        ({"spills": 900, "target": "sm_75"}, None),
        ({"shared": 99 * 1024 + 1}, "101377 B of shared memory, of which a block may use 101376"),
        ({"fused_shuffles": 2}, "2 sums over lanes of products that are not rounded first"),
        (NARROW, "no 16-byte global access, which the layout of x_ptr allows"),
        ({"wide_loads": 0}, None),
        ({**NARROW, "wide_argument": None}, None),
        ({**NARROW, "narrow_reason": "rows of 3"}, None),
        ({"error": "OutOfResources: shared\nmore"}, "does not compile: OutOfResources: shared more"),
    ],
)
def test_offenses(changes, reason, monkeypatch, capsys):
    """What fails the report, in one line with its kernel, and the exit code that follows."""
    row = row_of(**changes)
    found = compile_report.offenses([row], triton.__version__)
    assert found == ([f"whiten._fwd_kernel ({row['target']}, float16, some): {reason}"] if reason else [])
    monkeypatch.setattr("blink.kernels.launching._INTERPRETED", False)
    monkeypatch.setattr(ahead_of_time, "jobs", lambda *arguments: [])
    monkeypatch.setattr(compile_report, "_compile", lambda examine, jobs: [dict(row)])
    assert main(["inspect"]) == (1 if reason else 0)
    printed = capsys.readouterr().out
    assert all(line in printed for line in found)
    assert (f"narrow: {row['narrow_reason']}" in printed) == bool(row["narrow_reason"])


SPILLING = """
import torch, triton, triton.language as tl
from blink.kernels.examine.ahead_of_time import TARGETS, compile_launch
from blink.kernels._common import rounded_product
from blink.kernels.launching import Launch

@triton.jit
def _hoard_kernel(x_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at).to(tl.float32)
    tl.store(x_ptr + at, x * tl.sum(x, 0))

r = compile_launch(Launch(_hoard_kernel, (torch.empty(16384),), {"N": 16384}, 1), "sm_90")
print(r.spills, r.stack)

@triton.jit
def _sum_kernel(x_ptr, y_ptr, out_ptr, ROUNDED: tl.constexpr):
    row, column = tl.arange(0, 32), tl.arange(0, 4)
    x, y = tl.load(x_ptr + row[:, None] * 4 + column[None, :]), tl.load(y_ptr + row)[:, None]
    tl.store(out_ptr + column, tl.sum(rounded_product(x, y) if ROUNDED else x * y, 0))

tensors = torch.empty(128), torch.empty(32), torch.empty(4)
print(*[compile_launch(Launch(_sum_kernel, tensors, {"ROUNDED": r}, 4), "sm_90").fused_shuffles for r in (False, True)])
"""


def test_faults_are_seen(tmp_path):
    """A program of one warp that holds more than its registers can; a sum over lanes of bare products, and rounded."""
    script = tmp_path / "spilling.py"
    script.write_text(SPILLING.replace("import torch", f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport torch"))
    done = compiling(str(script))
    assert done.returncode == 0, done.stderr[-2000:]
    spills, stack, fused, rounded = map(int, done.stdout.split())
    assert spills > 0 and stack > 0
    assert fused > 0 and rounded == 0


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["whitten"], "unknown op 'whitten'; expected one of "),
        (
            ["--target", "sm_90,sm_91"],
            "unknown 'sm_91'; expected one or more of sm_75, sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx942",
        ),
        (["--dtype", "fp16"], "unknown 'fp16'; expected one or more of float16, bfloat16, float32"),
        (["--json", "/proc/no/report.json"], "could not make the folder"),
        (["--json", "."], "is a folder"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(arguments, expected, capsys):
    assert main(["inspect", *arguments]) == 2
    printed = capsys.readouterr()
    assert expected in printed.err and printed.err.count("\n") == 1 and not printed.out


@pytest.mark.skipif(not interpreting(), reason="the kernels are compiled here")
def test_the_interpreter_is_refused(capsys):
    assert main(["inspect", "--quick"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
