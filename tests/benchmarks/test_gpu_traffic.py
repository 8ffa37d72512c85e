"""The count of bytes that a GPU's kernels move, on programs small enough to count by hand."""

import pytest

PROGRAM = """HloModule jit_f

%scaled_rows (x: bf16[8,4], i: s32[]) -> bf16[1,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %row = bf16[1,4]{1,0} dynamic-slice(%x, %i, %i), dynamic_slice_sizes={1,4}
  ROOT %twice = bf16[1,4]{1,0} add(%row, %row)
}

%kept (all: bf16[8,4], row: bf16[1,4], i: s32[]) -> (bf16[8,4], f32[4]) {
  %all = bf16[8,4]{1,0} parameter(0)
  %row = bf16[1,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %updated = bf16[8,4]{1,0} dynamic-update-slice(%all, %row, %i, %i)
  %flat = bf16[4]{0} bitcast(%row)
  %wide = f32[4]{0} convert(%flat)
  ROOT %both = (bf16[8,4]{1,0}, f32[4]{0}) tuple(%updated, %wide)
}

%body (state: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %state = (s32[], bf16[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[8,4]{1,0} get-tuple-element(%state), index=1
  %row = bf16[1,4]{1,0} fusion(%x, %i), kind=kLoop, calls=%scaled_rows
  %pair = (bf16[8,4]{1,0}, f32[4]{0}) fusion(%x, %row, %i), kind=kLoop, calls=%kept
  %kept_rows = bf16[8,4]{1,0} get-tuple-element(%pair), index=0
  ROOT %next = (s32[], bf16[8,4]{1,0}) tuple(%i, %kept_rows)
}

%condition (state: (s32[], bf16[8,4])) -> pred[] {
  %state = (s32[], bf16[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x: bf16[8,4], w: bf16[4,4]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %w = bf16[4,4]{1,0} parameter(1)
  %product = (bf16[8,4]{1,0}, s8[16]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul"
  %y = bf16[8,4]{1,0} get-tuple-element(%product), index=0
  %zero = s32[] constant(0)
  %start = (s32[], bf16[8,4]{1,0}) tuple(%zero, %y)
  %loop = (s32[], bf16[8,4]{1,0}) while(%start), condition=%condition, body=%body
  %done = bf16[8,4]{1,0} get-tuple-element(%loop), index=1
  ROOT %copied = bf16[8,4]{1,0} copy(%done)
}
"""
INDEX, ROW, ALL = 4, 2 * 4, 2 * 8 * 4  # bytes


@pytest.fixture(scope="module")
def gpu_traffic(load_benchmark):
    return load_benchmark("gpu_traffic")


@pytest.fixture(scope="module")
def program(gpu_traffic):
    return gpu_traffic.parse(PROGRAM)


def test_of_a_slice_the_slice_is_read(gpu_traffic, program):
    assert gpu_traffic.fusion_bytes(program.computations["scaled_rows"]) == (ROW + INDEX) + ROW


def test_of_an_update_the_update_is_written_and_the_rest_stays(gpu_traffic, program):
    in_float32 = 4 * 4
    assert gpu_traffic.fusion_bytes(program.computations["kept"]) == (ROW + INDEX) + (ROW + in_float32)


def test_a_loop_counts_as_often_as_it_runs_and_products_apart(gpu_traffic, program):
    found = gpu_traffic.kernel_bytes(program, program.entry)
    in_the_loop = (ROW + INDEX + ROW) + (ROW + INDEX + ROW + 16)
    assert found == {"products": ALL + 2 * 16 + ALL + 16, "other": 5 * in_the_loop + 2 * ALL}
