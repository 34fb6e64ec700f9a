"""Hand-written programs whose traffic is known."""

import pytest

from densenet_jax.plan.hlo import Collective, Program

PLAIN = """HloModule plain

ENTRY %main (a: f32[8,16], b: bf16[16,4]) -> f32[8,4] {
  %a = f32[8,16]{1,0:T(8,128)} parameter(0)
  %b = bf16[16,4]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %wide = f32[16,4]{1,0} convert(%b)
  ROOT %dot = f32[8,4]{1,0} dot(%a, %wide), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_an_instruction_moves_its_operands_and_its_result():
    convert, dot = 16 * 4 * 2 + 16 * 4 * 4, 8 * 16 * 4 + 16 * 4 * 4 + 8 * 4 * 4
    assert Program(PLAIN).traffic() == convert + dot


FUSED = """HloModule fused

%body (p0: f32[100,10], p1: f32[10,10], p2: s32[]) -> f32[100,10] {
  %p0 = f32[100,10]{1,0} parameter(0)
  %p1 = f32[10,10]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %update = f32[100,10]{1,0} dynamic-update-slice(%p0, %p1, %p2, %zero)
}

%reader (p: f32[100,10]) -> f32[5,10] {
  %p = f32[100,10]{1,0} parameter(0)
  %flat = f32[1000]{0} bitcast(%p)
  %part = f32[50]{0} slice(%flat), slice={[0:50]}
  %again = f32[5,10]{1,0} slice(%p), slice={[0:5], [0:10]}
  %square = f32[5,10]{1,0} bitcast(%part)
  ROOT %sum = f32[5,10]{1,0} add(%square, %again)
}

ENTRY %main (buffer: f32[100,10], new: f32[10,10], at: s32[]) -> f32[5,10] {
  %buffer = f32[100,10]{1,0} parameter(0)
  %new = f32[10,10]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %written = f32[100,10]{1,0} fusion(%buffer, %new, %at), kind=kLoop, calls=%body
  ROOT %read = f32[5,10]{1,0} fusion(%written), kind=kLoop, calls=%reader
}
"""


def test_a_fusion_that_slices_moves_the_slices():
    writing = 400 + 4 + 400  # the new rows, where they go, and the rows written; the buffer stays where it is
    reading = 2 * 200 + 200
    assert Program(FUSED).traffic() == writing + reading


NESTED = FUSED.replace(
    "ENTRY",
    """%outer (q: f32[100,10]) -> f32[5,10] {
  %q = f32[100,10]{1,0} parameter(0)
  %inner = f32[5,10]{1,0} fusion(%q), kind=kLoop, calls=%reader
  ROOT %negated = f32[5,10]{1,0} negate(%inner)
}

ENTRY""",
).replace("fusion(%written), kind=kLoop, calls=%reader", "fusion(%written), kind=kOutput, calls=%outer")


def test_a_fusion_in_a_fusion_that_slices_moves_the_slices():
    assert Program(NESTED).traffic() == Program(FUSED).traffic()
    whole = NESTED.replace("negate(%inner)", "concatenate(%inner, %q)")
    assert Program(whole).traffic() == Program(FUSED).traffic() - 2 * 200 + 4000, "the rest is read beside it"


def test_sums_of_instructions_of_one_kind_and_path():
    traced = 'metadata={op_name="jit(step)/block/dot" stack_frame_id=1}'
    text = NESTED.replace("kind=kOutput, calls=%outer", f"kind=kOutput, calls=%outer, {traced}")
    text = text.replace("negate(%inner)", "convolution(%inner, %inner)").replace("bf16", "f32")
    program = Program(text)
    (written, read) = program.moves()
    assert written == ("fusion", "", 1, 804, 804)
    assert read == ("convolution", "jit(step)/block/dot", 1, 600, 600)
    assert written[3] + read[3] == program.traffic()


LOOP = """HloModule loop

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%step (state: (s32[], f32[256])) -> (s32[], f32[256]) {
  %state = (s32[], f32[256]{0}) parameter(0)
  %values = f32[256]{0} get-tuple-element(%state), index=1
  %reduced = f32[256]{0} all-reduce(%values), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  %count = s32[] get-tuple-element(%state), index=0
  ROOT %next = (s32[], f32[256]{0}) tuple(%count, %reduced)
}

%more (state.1: (s32[], f32[256])) -> pred[] {
  %state.1 = (s32[], f32[256]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (start: (s32[], f32[256]), shard: bf16[64]) -> bf16[128] {
  %start = (s32[], f32[256]{0}) parameter(0)
  %shard = bf16[64]{0} parameter(1)
  %looped = (s32[], f32[256]{0}) while(%start), condition=%more, body=%step, backend_config={TRIPS}
  %gather = (bf16[64]{0}, bf16[128]{0}) all-gather-start(%shard), channel_id=2, dimensions={0}
  ROOT %whole = bf16[128]{0} all-gather-done(%gather)
}
"""


LOOP = LOOP.replace("TRIPS", '"known_trip_count":{"n":"3"}')


def test_collectives_are_counted_with_their_sizes_and_as_often_as_their_loop_runs():
    assert Program(LOOP).collectives() == [Collective("all-reduce", 1024, 3), Collective("all-gather", 256, 1)]


@pytest.mark.parametrize(("once", "runs"), [(False, 3), (True, 1)])
def test_a_loop_moves_its_body_as_often_as_it_runs(once, runs):
    gather = 128 + 128 + 256  # started with its operand and the pair of buffers
    assert Program(LOOP).traffic(once=once) == runs * 2048 + gather


COPIES = """HloModule copies

ENTRY %main (a: bf16[8,64], b: f32[4]) -> bf16[8,64] {
  %a = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[4]{0:T(128)S(1)} parameter(1)
  %copying = (bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, bf16[8,64]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%a)
  %copied = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} copy-done(%copying)
  %slicing = ((bf16[8,64]{1,0}), bf16[2,64]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:2], [0:64]}
  %sliced = bf16[2,64]{1,0:S(1)} slice-done(%slicing)
  %room = bf16[2,64]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %kernel = bf16[8,64]{1,0} custom-call(%copied, %a, %sliced), custom_call_target="tpu_custom_call", TOLD
  ROOT %sum = bf16[8,64]{1,0:S(1)} add(%kernel, %copied)
}
""".replace("TOLD", 'backend_config={"cost_estimate":{"flops":"1","bytes_accessed":"640"}}')


def test_values_on_the_chip_are_no_memory_traffic():
    a, part = 8 * 64 * 2, 2 * 64 * 2
    kernel, added = 640, 3 * a
    assert Program(COPIES).traffic() == 2 * a + 2 * part + kernel + added
    share = (a + a) / (a + a + part + a)  # of the kernel's operands and result: one operand and the result
    assert Program(COPIES).traffic(off_chip=True) == round(a + part + kernel * share + a)
    assert Program(PLAIN).traffic(off_chip=True) == Program(PLAIN).traffic() - 16 * 4 * 2


def test_text_that_is_no_program_moves_nothing():
    assert Program("nothing of the kind").traffic() == 0
    assert Program("").collectives() == []
