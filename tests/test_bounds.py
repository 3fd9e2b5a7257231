"""What a kernel takes at least on a GPU that is not here: loops followed, instructions priced, bytes counted."""

import json

import pytest
import torch

from blink.__main__ import main
from blink.kernels import launching
from blink.kernels.examine import bounds_report
from blink.kernels.examine.bounds import GPUS, Work, cost, machine_loops
from blink.kernels.examine.control_flow import Loop, Program, loops, memory_of
from tests.test_ahead_of_time import ROOT, compiling

# for i = program; i < n; i += programs: for j = 0; j < table[i]; j++: a pointer from a table, then what data decides
NESTED = """
.visible .entry _k(
	.param .u64 .ptr .global .align 1 _k_param_0,
	.param .u32 _k_param_1,
	.param .u64 .ptr .global .align 1 _k_param_2
)
.reqntid 64
{
	.reg .pred 	%p<9>;
// %bb.0:
	ld.param.b32 	%r1, [_k_param_1];
	ld.param.b64 	%rd1, [_k_param_0];
	ld.param.b64 	%rd9, [_k_param_2];
	mov.u32 	%r2, %ctaid.x;
	mov.u32 	%r3, %nctaid.x;
	setp.ge.s32 	%p1, %r2, %r1;
	@%p1 bra 	$L__BB0_9;
$L__BB0_2:
	mad.wide.s32 	%rd2, %r2, 4, %rd1;
	// begin inline asm
	ld.global.b32 { %r4 }, [ %rd2 + 0 ];
	// end inline asm
	mov.b32 	%r5, 0;
	setp.lt.s32 	%p2, %r4, 1;
	@%p2 bra 	$L__BB0_4;
$L__BB0_3:
	ld.global.v4.b32 { %r10, %r11, %r12, %r13 }, [ %rd9 + 16 ];
	fma.rn.f32 	%r14, %r10, %r11, %r12;
	setp.gt.f32 	%p7, %r14, 0f00000000;
	@%p7 bra 	$L__BB0_5;
	add.s32 	%r15, %r15, 7;
$L__BB0_5:
	add.s32 	%r5, %r5, 1;
	setp.lt.s32 	%p3, %r5, %r4;
	@%p3 bra 	$L__BB0_3;
$L__BB0_4:
	add.s32 	%r2, %r2, %r3;
	setp.lt.s32 	%p4, %r2, %r1;
	@%p4 bra 	$L__BB0_2;
	st.global.b32 [ %rd9 + 0 ], { %r14 };
$L__BB0_9:
	ret;
}
"""


def test_loops_of_a_program_run_as_often_as_its_sizes_say():
    program = Program(NESTED)
    table = torch.tensor([3, 0, 2, -5, 4], dtype=torch.int32)
    arguments = [table.data_ptr(), 5, 0]
    load = memory_of([(table.data_ptr(), 20)])
    outer, inner = program.loops
    assert inner.parent == 0 and outer.parent is None

    def run(number: int) -> tuple[int, int, int]:
        counts = program.run(arguments, (number,), (2,), 64, load)
        names = [instruction.name for instruction in program.instructions]
        return counts[outer.first], counts[inner.first], counts[names.index("st.global.b32")]

    # programs 0 and 1 of two: entries 0, 2, 4 and 1, 3 of the table; what data decides counts as not jumped over
    assert run(0) == (3, 3 + 2 + 4, 1) and run(1) == (2, 0, 1)
    counts = program.run(arguments, (0,), (2,), 64, load)
    assert counts[[i.operands[-1:] for i in program.instructions].index(("7",))] == 9
    # a program beyond the end returns at once
    assert program.run(arguments, (7,), (8,), 64, load)[outer.first] == 0
    # where the table is not known, an inner loop runs once
    assert program.run(arguments, (0,), (2,), 64)[inner.first] == 3


def test_a_program_that_does_not_end_is_given_up(monkeypatch):
    monkeypatch.setattr("blink.kernels.examine.control_flow._MOST_BLOCKS", 100)
    with pytest.raises(RuntimeError, match="no end after 100 pieces of program"):
        Program(NESTED.replace("add.s32 	%r2, %r2, %r3", "mov.b32 	%r2, %r2")).run([0, 5, 0], (0,), (2,), 64)


def test_a_count_of_conditions_is_followed():
    """What Triton makes of a sum of comparisons."""
    counted = NESTED.replace(
        "setp.ge.s32 	%p1, %r2, %r1;", "popc.b32 	%r9, %r1;\n	setp.eq.b32 	%p1, %r9, 2;"
    )
    ran = [Program(counted).run([0, n, 0], (0,), (1,), 64)[Program(counted).loops[0].first] for n in (1, 3, 5, 7)]
    assert ran == [1, 0, 0, 7]


def test_bytes_go_to_the_tensors_that_addresses_come_from():
    found = {(kind, size, of) for _, kind, size, of in Program(NESTED).accesses()}
    table, data = frozenset({"_k_param_0"}), frozenset({"_k_param_2"})
    assert found == {("ld", 4, table), ("ld", 16, data), ("st", 4, data)}


def test_memory_is_read_within_what_is_known():
    values = torch.arange(4, dtype=torch.int64)
    load = memory_of([(values.data_ptr(), 32)])
    assert [load(values.data_ptr() + 8 * i, 8) for i in range(4)] == [0, 1, 2, 3]
    assert load(values.data_ptr() + 28, 8) is None and load(values.data_ptr() - 8, 8) is None


def test_loops_nest_by_their_ranges():
    assert loops([(5, 9), (1, 20), (5, 12), (30, 31)]) == [Loop(1, 20, None), Loop(5, 12, 0), Loop(30, 31, None)]


# as for sm_80: a loop is left by a call of what stands behind it, and the slow path of a division behind all
MACHINE_CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   CALL.REL.NOINC 0x90 ;
        /*0020*/                   FFMA R2, R2, R2, R2 ;
        /*0030*/              @!P0 CALL.REL.NOINC 0x50 ;
        /*0040*/                   BRA 0x20 ;
        /*0050*/              @!P1 CALL.REL.NOINC 0x70 ;
        /*0060*/                   BRA 0x10 ;
        /*0070*/                   EXIT ;
        /*0080*/                   NOP ;
        /*0090*/               @P2 BRA 0xb0 ;
        /*00a0*/                   MUFU.RCP R3, R3 ;
        /*00b0*/                   RET.REL.NODEC R4 0x0 ;
        /*00c0*/                   BRA 0xc0 ;
"""


def test_loops_of_machine_code_are_found_and_subroutines_left_out():
    instructions, found = machine_loops(MACHINE_CODE)
    assert found == [Loop(0x10, 0x60, None), Loop(0x20, 0x40, 0)]
    assert [address for address, _ in instructions] == [*range(0, 0x80, 0x10)]


@pytest.mark.parametrize(
    "name, target, expected",
    [
        ("FFMA", "sm_90", ("fma", 0.25)),
        ("FFMA", "sm_80", ("fma", 0.5)),
        ("HFMA2.MMA", "sm_80", ("fma", 0.25)),
        ("IMAD.WIDE.U32", "sm_90", ("fma", 0.5)),
        ("IMAD.MOV.U32", "sm_90", ("fma", 0.25)),
        ("LOP3.LUT", "sm_90", ("alu", 0.5)),
        ("F2FP.F16.F32.PACK_AB", "sm_90", ("alu", 0.5)),
        ("MUFU.EX2", "sm_90", ("sfu", 2.0)),
        ("I2F.U16", "sm_90", ("sfu", 2.0)),
        ("DFMA", "sm_90", ("fp64", 0.5)),
        ("DFMA", "sm_89", ("fp64", 16.0)),
        ("LDG.E.128", "sm_90", ("lsu", 4.0)),
        ("LDG.E.U8", "sm_90", ("lsu", 1.0)),
        ("STS.64", "sm_90", ("lsu", 2.0)),
        ("LDSM.16.M88.4", "sm_90", ("lsu", 4.0)),
        ("SHFL.BFLY", "sm_90", ("lsu", 1.0)),
        ("HMMA.16816.F32", "sm_80", ("tensor", 2.0)),
        ("HMMA.1688.F32.TF32", "sm_80", ("tensor", 2.0)),
        ("HGMMA.64x32x16.F32", "sm_90", ("tensor", 4.0)),
        ("LDC", "sm_90", (None, 0.0)),
        ("LDGSTS.E.BYPASS.128", "sm_80", ("lsu", 4.0)),
        ("BAR.SYNC.DEFER_BLOCKING", "sm_90", (None, 0.0)),
        ("UIADD3", "sm_90", (None, 0.0)),
        ("BRA", "sm_90", (None, 0.0)),
    ],
)
def test_an_instruction_takes_its_unit_so_many_clocks(name, target, expected):
    assert cost(name, target) == expected


def test_the_longest_unit_is_the_bound_and_waves_are_whole():
    gpu = GPUS["H100"]
    # 4 of 5 resident on every SM, in memory's time of 1 ms
    fits = Work(4 * gpu.sms, 5, {"issue": 0.5e-3 * gpu.sms * gpu.clock}, round(1e-3 * gpu.bandwidth), False)
    assert fits.times(gpu)["issue"] == pytest.approx(0.5e-3) and fits.waves(gpu) == pytest.approx(0.8)
    assert fits.bound(gpu) == ("memory", pytest.approx(1e-3))
    # a little more than one wave takes as long as two
    over = Work(5 * gpu.sms + 1, 5, {"issue": 3e-3 * gpu.sms * gpu.clock}, round(1e-3 * gpu.bandwidth), False)
    assert over.bound(gpu) == ("issue", pytest.approx(3e-3 * 2 / over.waves(gpu)))
    # one program has one SM's share of the cache's bandwidth
    one = Work(1, 5, {}, 64_000, False)
    assert one.bound(gpu) == ("memory", pytest.approx(1000 / gpu.clock))


LOOPED = """
import json
import torch, triton, triton.language as tl
from blink.kernels.examine import ahead_of_time
from blink.kernels.examine.bounds import work
from blink.kernels.launching import Launch

@triton.jit
def _scale_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    for start in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < n, other=0.0)
        tl.store(y_ptr + at, tl.exp2(x) * 3.0, mask=at < n)

n = 64 * 512 * 5
launch = Launch(_scale_kernel, (torch.empty(n), torch.empty(n), n), {"BLOCK": 512}, 4, None, (64,))
out = []
for target in ("sm_80", "sm_90"):
    compiled, found = ahead_of_time.compile_fully(launch, target)
    done = work(launch, compiled.asm["ptx"], found, {launch.arguments[0].data_ptr(): 1000})
    out.append([done.programs, done.resident, done.cycles, done.bytes, done.guessed])
print(json.dumps(out))
"""


def test_a_kernel_whose_work_is_known_is_counted_exactly(tmp_path):
    """Five rounds of 64 programs of four warps, of which each thread takes four values: all of y, of x as limited."""
    script = tmp_path / "looped.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{LOOPED}")
    done = compiling(str(script))
    assert done.returncode == 0, done.stderr[-2000:]
    n = 64 * 512 * 5
    for programs, resident, cycles, moved, guessed in json.loads(done.stdout):
        assert programs == 64 and resident >= 8 and not guessed
        # an exp2 a value at 16 lanes a clock; a load and a store of 16 bytes for four
        assert cycles["sfu"] == n / 16 and cycles["lsu"] == 2 * n / 4 / 32 * 4
        assert moved == 1000 + 4 * n
        # a handful of instructions a value beside them
        assert n / 128 < cycles["issue"] < 20 * n / 128


def test_the_table_names_what_bounds_each_kernel(tmp_path):
    path = tmp_path / "bounds.json"
    done = compiling("-m", "blink", "inspect", "pool_norm_act", "--bounds", "A100,H200", "--json", str(path))
    assert done.returncode == 0, done.stderr[-2000:]
    content = json.loads(path.read_text())
    assert content["recipe"] == "blink" and content["command"][:3] == ["blink", "inspect", "pool_norm_act"]
    for gpu in ("A100", "H200"):
        rows = [row for row in content["rows"] if gpu in row["gpus"]]
        pooling = [row for row in rows if row["kernel"] == "pool_norm_act._pool_kernel"]
        assert [row["launches"] for row in pooling] == [1, 1, 1]
        # three loops, one in the other, in either machine code
        assert not any(row["guessed"] for row in rows)
        for row in pooling:
            # what it reads, and writes, a quarter as much with two bits for the index
            b, c, h, w = map(int, row["case"].split("-")[0].split("x"))
            least = b * c * (2 * h * w + 2.25 * (h // 2) * (w // 2))
            # lanes beyond an image, and an odd edge, count as read
            assert 0.98 * least <= row["bytes"] <= 1.05 * least
            units = row["gpus"][gpu]["units"]
            assert max(units, key=units.get) == row["gpus"][gpu]["bound"]
    for line in done.stdout.splitlines():
        assert len(line) <= 80 or not line[0].isdigit()
    assert done.stdout.startswith("blink inspect pool_norm_act --bounds A100,H200 --json ")
    assert "A100: 108 SMs" in done.stdout and "H200: 132 SMs" in done.stdout
    assert "us, " in done.stdout.splitlines()[-1]


def test_a_step_is_compiled_once_for_gpus_of_one_kind():
    jobs = bounds_report.jobs("blink", ["float16"], ["H100", "H200", "A100"], ["whiten"])
    assert [(job.target, job.sms, job.calls) for job in jobs] == [("sm_90", 132, 1), ("sm_80", 108, 1)]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--bounds", "V100"], "unknown 'V100'; expected one or more of A100, H100, H200, 4090, 5090"),
        (["--bounds", "H100", "--quick"], "--bounds compiles a step's kernels"),
        (["--bounds", "H100", "squeeze_excite"], "a step of blink calls none of squeeze_excite"),
    ],
)
def test_a_mistake_gets_one_line(arguments, expected, capsys, monkeypatch):
    monkeypatch.setattr("blink.kernels.launching._INTERPRETED", False)
    assert main(["inspect", *arguments]) == 2
    printed = capsys.readouterr()
    assert expected in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_programs_fill_a_device_once():
    device = torch.device("cpu")
    with launching.assumed_processors(108):
        assert launching.resident(device, 4) == 432
    assert launching.resident(device, 4) == 528
