"""The emulator on small kernels: what a GPU must not be asked to do is a fault or an error, never passed over."""

import numpy as np
import pytest
import torch
from ptx_emulator.findings import EmulationError, Findings
from ptx_emulator.global_memory import GlobalMemory
from ptx_emulator.grid import Launch
from ptx_emulator.translation import Translation

WARPS = 4
PTX = """
.visible .entry small(
	.param .u64 .ptr .global .align 1 source,
	.param .u64 .ptr .global .align 1 target
)
.reqntid %d
{
	.reg .pred 	%%p<9>;
	.reg .b16 	%%rs<9>;
	.reg .b32 	%%r<99>;
	.reg .f32 	%%f<9>;
	.reg .b64 	%%rd<9>;
	ld.param.b64 	%%rd1, [source];
	ld.param.b64 	%%rd2, [target];
	mov.u32 	%%r1, %%tid.x;
	mul.wide.u32 	%%rd3, %%r1, 4;
	add.s64 	%%rd4, %%rd1, %%rd3;
	add.s64 	%%rd5, %%rd2, %%rd3;
	shl.b32 	%%r2, %%r1, 2;
	mov.b32 	%%r3, global_smem;
	add.s32 	%%r4, %%r3, %%r2;
	%s
	ret;
}
"""
COPY_IN = "ld.global.b32 { %r5 }, [ %rd4 + 0 ]; st.shared.b32 [ %r4 + 0 ], %r5;"
FROM_THE_NEXT_WARP = "xor.b32 %r6, %r2, 128; add.s32 %r7, %r3, %r6; ld.shared.b32 { %r8 }, [ %r7 + 0 ];"
FROM_THE_NEXT_LANE = "xor.b32 %r6, %r2, 4; add.s32 %r7, %r3, %r6; ld.shared.b32 { %r8 }, [ %r7 + 0 ];"
COPY_OUT = "st.global.b32 [ %rd5 + 0 ], { %r8 };"
COPY_ASYNC = "cp.async.ca.shared.global [ %r4 + 0 ], [ %rd4 + 0 ], 4; cp.async.commit_group;"


class Small:
    """One launch of a kernel with this body; a source and a target of a word for each thread."""

    def __init__(self, body, blocks=1, elements=32 * WARPS, seed=0):
        self.findings = Findings()
        memory = GlobalMemory(self.findings, {})
        self.source = torch.arange(elements, dtype=torch.int32) + 100
        self.target = torch.zeros(elements, dtype=torch.int32)
        memory.poison(self.target, np.random.default_rng(seed))
        arguments = {name: memory.address(getattr(self, name), name) for name in ("source", "target")}
        translation = Translation(PTX % (32 * WARPS, body))
        launch = Launch(translation, (blocks,), arguments, 128 * WARPS, memory, self.findings, seed)
        self.executed = launch.run()

    @property
    def faults(self):
        return {what for _, _, what in self.findings.faults}


def test_a_right_kernel_has_no_faults():
    ran = Small(f"{COPY_IN} bar.sync 0; {FROM_THE_NEXT_WARP} {COPY_OUT}")
    assert not ran.findings.faults
    assert ran.target.tolist() == [100 + (i ^ 32) for i in range(128)]
    assert ran.executed["bar.sync"] == WARPS


# ---- instructions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instruction", "reason"),
    [
        ("frobnicate.b32 %r5, %r1", "unknown opcode"),
        ("add.sat.s32 %r5, %r1, %r2", "unknown modifier or type"),
        ("shl.b128 %r5, %r1, 1", "unknown modifier or type"),
        ("mul.lo.s24 %r5, %r1, %r2", "type"),
        ("add.f32 %f1, %f2, %f3", "may be contracted by the assembler"),
        ("fma.rn.f32 %f1, %f2, %f3, %f4", "unknown fma"),
        ("cvt.rz.f16.f32 %r5, %f1", "unknown conversion"),
        ("cvt.sat.s32.s64 %r5, %rd1", "unknown modifier"),
        ("prmt.b32.f4e %r5, %r1, %r2, %r3", "unknown mode"),
        ("ld.global.nc.b32 { %r5 }, [ %rd4 + 0 ]", "unknown space or modifier"),
        ("ld.local.b32 { %r5 }, [ %rd4 + 0 ]", "unknown space or modifier"),
        ("ld.global.v2.b32 { %r5 }, [ %rd4 + 0 ]", "number of registers"),
        ("add.s64 %rd6, %rd1, %r1", "not of"),
        ("atom.global.gpu.relaxed.max.u32 %r5, [ %rd4 + 0 ], %r1", "unknown atomic"),
        ("red.global.sys.relaxed.add.u32 [ %rd4 + 0 ], %r1", "unknown reduction"),
        ("bar.sync 1", "unknown barrier"),
        ("bar.arrive 0", "unknown barrier"),
        ("@%p1 cp.async.wait_group 0", "guarded"),
        ("cp.async.bulk.commit_group", "unknown cp"),
        ("shfl.sync.up.b32 %r5, %r1, 1, 31, -1", "unknown shfl"),
        ("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%r5}, {%r6}, {%r7}, {%r8}", "unknown mma"),
        ("fence.acq_rel.gpu", "unknown fence"),
        ("membar.gl", "unknown opcode"),
    ],
)
def test_what_is_not_known_is_an_error_that_names_the_line(instruction, reason):
    with pytest.raises(EmulationError, match=rf"line 22: .*{reason}") as raised:
        Translation(PTX % (32, instruction + ";"))
    assert instruction.split()[0] in str(raised.value)


@pytest.mark.parametrize(
    ("ptx", "reason"),
    [
        ("", "0 entries"),
        (PTX % (32, "") * 2, "2 entries"),
        (PTX % (32, "add.s32 %r5, %r1, <3>;"), "operand"),
        (PTX.replace("%%r<99>", "%%q<99>") % (32, ""), "register %r1 is not declared"),
    ],
)
def test_text_that_is_no_kernel_is_an_error(ptx, reason):
    with pytest.raises(EmulationError, match=reason):
        Translation(ptx)


def test_branches_are_followed():
    loop = "mov.b32 %r8, 0; $L1: add.s32 %r8, %r8, 1; setp.lt.s32 %p1, %r8, 5; @%p1 bra $L1;"
    lines = loop.replace("$L1:", "\n$L1:\n")
    ran = Small(lines + COPY_OUT)
    assert (ran.target == 5).all()
    assert ran.executed["setp.lt.s32"] == 5 * WARPS


def test_a_lane_knows_the_lanes_below_it():
    ran = Small(f"mov.u32 %r8, %lanemask_lt; {COPY_OUT}")
    assert ran.target.tolist() == [(1 << lane) - 1 for lane in range(32)] * WARPS


def test_a_sum_of_two_types_is_rounded_once():
    one = "mov.b16 %rs1, 15361; mov.b32 %f1, 0f3F800001;"  # 1 + 2**-10 and 1 + 2**-23
    ran = Small(f"{one} add.rn.f32.f16 %f2, %rs1, %f1; mov.b32 %r8, %f2; {COPY_OUT}")
    assert (ran.target.view(torch.float32) == 2 + 2.0**-10).all()  # a tie, to even


# ---- errors that end it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("st.global.b32 [ %rd5 + 0 ], { %r8 }; mov.b32 %r8, 1;", "UnboundLocalError.*r8"),
        ("st.global.b32 [ %rd5 + 4 ], { %r1 };", "out of bounds of target, up to byte 515"),
        ("st.global.b32 [ %rd5 + 2 ], { %r1 };", "is not a multiple of 4"),
        ("st.global.b32 [ %rd3 + 0 ], { %r1 };", "is in no tensor"),
        ("st.shared.b32 [ %r4 + 4 ], %r1;", "shared memory out of bounds"),
        ("st.shared.b32 [ %r4 + 1 ], %r1;", "shared address is not a multiple of 4"),
        ("ld.shared.b32 { %r8 }, [ %r4 + 0 ];", "read of shared memory that nobody wrote"),
        ("setp.lt.u32 %p1, %r1, 7;\n@%p1 bra $L1;\n$L1:\n", "lanes of a warp differ"),
        ("setp.lt.u32 %p1, %r1, 64;\n@%p1 bra $L1;\nbar.sync 0;\n$L1:\n", "that not all warps reach"),
        ("setp.lt.u32 %p1, %r1, 64;\n@%p1 bra $L1;\nbar.sync 0;\nret;\n$L1:\nbar.sync 0;\n", "different barriers"),
        ("$L1:\nld.global.b32 { %r8 }, [ %rd4 + 0 ];\nbra $L1;\n", "does not end"),
    ],
)
def test_what_a_gpu_must_not_be_asked_to_do_is_an_error(body, reason):
    with pytest.raises(EmulationError, match=reason):
        Small(body)


# ---- faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("ld.global.b32 { %r8 }, [ %rd5 + 0 ];", "read of global memory that nobody wrote"),
        ("red.global.gpu.relaxed.add.u32 [ %rd5 + 0 ], %r1;", "atomic on memory that nobody wrote"),
        ("st.global.b32 [ %rd2 + 0 ], { %r1 };", "lanes store different bytes to one address"),
        ("mov.b32 %r8, 1; st.global.b32 [ %rd2 + 0 ], { %r8 };", "store over what another warp of the launch stores"),
        ("st.shared.b32 [ %r3 + 0 ], %r1;", "shared memory race: write after write of another warp"),
        (f"{COPY_IN} {FROM_THE_NEXT_LANE}", "read of what another lane of the warp wrote, without a barrier"),
        (f"{COPY_ASYNC} ld.shared.b32 {{ %r8 }}, [ %r4 + 0 ];", "read of shared memory that a cp.async is still to"),
        (f"{COPY_ASYNC} st.shared.b32 [ %r4 + 0 ], %r1;", "write to shared memory that a cp.async is still to write"),
        (COPY_ASYNC, "block ends with copies or products that nobody waited for"),
        (f"{COPY_ASYNC} cp.async.wait_group 0; {FROM_THE_NEXT_LANE}", "read of what another lane of the warp wrote"),
    ],
)
def test_what_would_be_right_only_by_luck_is_a_fault(body, fault):
    assert any(each.startswith(fault) for each in Small(body).faults)


@pytest.mark.parametrize("seed", range(5))
def test_a_missing_barrier_is_a_fault_whatever_the_order(seed):
    filled = f"{COPY_IN} bar.sync 0;"
    overwritten = f"{filled} {FROM_THE_NEXT_WARP} add.s32 %r8, %r8, 1; st.shared.b32 [ %r4 + 0 ], %r8;"
    races = {each for each in Small(overwritten, seed=seed).faults if each.startswith("shared memory race: ")}
    assert races
    assert races <= {
        "shared memory race: write after read of another warp",
        "shared memory race: read after write of another warp",
    }
    between = overwritten.replace("add.s32 %r8", "bar.sync 0; add.s32 %r8")
    assert not Small(between, seed=seed).faults


def test_a_barrier_of_the_warp_orders_its_lanes():
    assert not Small(f"{COPY_IN} bar.warp.sync -1; {FROM_THE_NEXT_LANE} {COPY_OUT}").faults


def test_atomics_of_all_blocks_are_added():
    ran = Small("mov.b32 %r8, 3; red.global.gpu.relaxed.add.u32 [ %rd4 + 0 ], %r8;", blocks=7)
    assert not ran.faults
    assert ran.source.tolist() == [100 + i + 21 for i in range(128)]


def test_what_was_added_is_read_after_an_acquire_and_a_barrier_only():
    add = "mov.b32 %r8, 1; red.global.gpu.relaxed.add.u32 [ %rd4 + 0 ], %r8; bar.sync 0;"
    arrive = "setp.eq.b32 %p1, %r1, 0; @%p1 atom.global.gpu.acq_rel.add.u32 %r9, [ %rd1 + 0 ], %r8;"
    read = "ld.global.b32 { %r10 }, [ %rd4 + 0 ];"
    fault = "read of what is added by atomics, without an acquire before a barrier"
    assert fault in Small(f"{add} {read}").faults
    assert fault in Small(f"{add} {arrive} {read}").faults
    assert fault not in Small(f"{add} {arrive} bar.sync 0; {read}").faults
