"""The reader of collectives: on text of known meaning, and (eight_devices.py) on programs of known communication."""

from pathlib import Path

import pytest

from nag_jax.errors import NagJaxError
from nag_jax.plan.collectives import Collective, find_collectives, shape_bytes, summarize

LOOP = """\
HloModule jit_f, is_scheduled=true, replica_count=1, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0:T(128)}) parameter(0)
  %x = f32[8]{0:T(128)} get-tuple-element(%p), index=1
  %reduced = f32[8]{0:T(128)} all-reduce(%x), channel_id=1, replica_groups=GROUPS, to_apply=%add
  ROOT %next = (s32[], f32[8]{0:T(128)}) tuple(%i, %reduced)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  %limit = s32[]{:T(128)} constant(12)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %loop = (s32[], /*index=1*/f32[8]{0}) while(%start), condition=%condition, body=%bodyCOUNT
  ROOT %y = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


def loop(groups: str = "{{0,1},{2,3}}", count: str = "") -> str:
    return LOOP.replace("GROUPS", groups).replace("COUNT", count)


def program(*lines: str) -> str:
    entry = "\n".join(f"  {line}" for line in lines)
    return f"HloModule jit_f, replica_count=1, num_partitions=4\n\nENTRY %main (x: f32[8]) -> f32[8] {{\n{entry}\n}}\n"


def test_bytes_of_shapes():
    assert shape_bytes("f32[8,4]{1,0:T(8,128)S(1)}") == 128
    assert shape_bytes("(bf16[3,5]{1,0}, /*index=1*/u32[]{:S(2)}, pred[7])") == 30 + 4 + 7
    assert shape_bytes("f8e4m3fn[9]") == 9 and shape_bytes("s4[5]") == 3


def test_a_loops_body_counts_as_often_as_it_runs():
    (found,) = find_collectives(loop())
    assert found == Collective("all-reduce", num_bytes=32, group_size=2, count=12)
    (found,) = find_collectives(loop(count=', backend_config={"known_trip_count":{"n":"7"}}'))
    assert found.count == 7


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3}}", 4),
        ("{}", 4),
        ("[2,2]<=[4]", 2),
        ("[1,4]<=[2,2]T(1,0)", 4),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_1'}", 2),
        ("mesh['axis_0'=1,'axis_1'=4] {'axis_0','axis_1'}", 4),
        ("mesh['axis_0'=4] {'axis_0':(1)2}", 2),
    ],
)
def test_every_way_to_write_groups(groups, size):
    assert find_collectives(loop(groups))[0].group_size == size


def test_an_unknown_text_is_refused_not_miscounted():
    with pytest.raises(NagJaxError, match="devices of a collective"):
        find_collectives(loop("unheard_of"))
    with pytest.raises(NagJaxError, match="loop loop"):
        find_collectives(loop().replace("constant(12)", "parameter(1)"))
    with pytest.raises(NagJaxError, match="ENTRY"):
        find_collectives("nothing")


def test_an_asynchronous_collective_counts_once_by_its_result():
    hlo = program(
        "%start = (f32[2]{0}, f32[8]{0}) all-gather-start(%x), replica_groups=[1,4]<=[4], dimensions={0}",
        "ROOT %done = f32[8]{0} all-gather-done(%start)",
    )
    assert find_collectives(hlo) == (Collective("all-gather", 32, 4),)


def test_a_reduce_scatter_counts_what_it_takes():
    hlo = program("ROOT %r = f32[2]{0} reduce-scatter(%x), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add")
    assert find_collectives(hlo) == (Collective("reduce-scatter", 32, 4),)


def test_pieces_of_one_collective_count_once():
    gather = "f32[8]{0} all-gather(%p), channel_id=3, replica_groups={}, frontend_attributes={chain_id=\"0\"}"
    hlo = f"""HloModule jit_f, num_partitions=4

%first (p: f32[2]) -> f32[8] {{
  %p = f32[2]{{0}} parameter(0)
  %g = {gather}
  ROOT %s = (f32[8]{{0}}, u32[]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%later (p: f32[2]) -> f32[8] {{
  %p = f32[2]{{0}} parameter(0)
  ROOT %h = {gather}
}}

ENTRY %main (x: f32[2]) -> f32[8] {{
  %x = f32[2]{{0}} parameter(0)
  %a = (f32[8]{{0}}, u32[]) fusion(%x), kind=kCustom, calls=%first
  ROOT %b = f32[8]{{0}} fusion(%x), kind=kCustom, calls=%later
}}
"""
    assert find_collectives(hlo) == (Collective("all-gather", 32, 4),)


def test_of_the_branches_of_a_conditional_the_larger_one_counts():
    branch = """%NAME (p: f32[SIZE]) -> f32[SIZE] {
  %p = f32[SIZE]{0} parameter(0)
  ROOT %g = f32[SIZE]{0} all-reduce(%p), replica_groups={}, to_apply=%add
}

"""
    sizes = {"small": "2", "large": "6"}
    branches = "".join(branch.replace("NAME", name).replace("SIZE", size) for name, size in sizes.items())
    choose = "ROOT %c = f32[6]{0} conditional(%i, %x, %x), branch_computations={%small, %large}"
    hlo = program(choose).replace("ENTRY", branches + "ENTRY")
    assert find_collectives(hlo) == (Collective("all-reduce", 24, 4),)


def test_what_a_device_receives():
    """Ring algorithms: (n - 1) / n of an array for a gather, twice that for an all-reduce."""
    assert Collective("all-gather", 800, 8).received_bytes == 700
    assert Collective("reduce-scatter", 800, 8, count=3).received_bytes == 2100
    assert Collective("all-reduce", 800, 8).received_bytes == 1400
    assert Collective("all-reduce", 800, 1).received_bytes == 0
    assert Collective("collective-permute", 800, 8, count=2).received_bytes == 1600
    sums = summarize([Collective("all-gather", 8, 2, 3), Collective("all-gather", 4, 2)])
    assert sums == {"all-gather": {"count": 4, "bytes": 28, "received": 14.0}}


@pytest.fixture(scope="module")
def eight(on_eight_devices):
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    return on_eight_devices(Path(__file__).with_name("eight_devices.py"), flags=flags)


@pytest.mark.serial
def test_a_gathered_parameter_costs_its_bytes(eight):
    assert eight["gather"] == {"all-gather": {"count": 1, "bytes": 4 * 64 * 128, "received": 4 * 64 * 128 * 7 / 8}}


@pytest.mark.serial
def test_a_scanned_all_reduce_counts_every_time(eight):
    assert eight["scan"] == {"all-reduce": {"count": 5, "bytes": 5 * 4 * 32, "received": 5 * 4 * 32 * 2 * 7 / 8}}


@pytest.mark.serial
def test_data_parallel_training_reduces_the_gradients_of_all_parameters(eight):
    """All gradients once, in float32, and the few numbers of the metrics."""
    rest = eight["data"]["all-reduce"]["bytes"] - eight["parameter_bytes"]
    assert 0 < rest <= 4096
    assert list(eight["data"]) == ["all-reduce"]


@pytest.mark.serial
def test_the_state_of_a_device_falls_as_parameters_are_split(eight):
    """1/n of what is split, and all of the small parameters that are not."""
    whole, small = eight["state_bytes"]["1"], eight["small_state_bytes"]
    for fsdp in (2, 4, 8):
        assert eight["state_bytes"][str(fsdp)] == small + (whole - small) // fsdp


@pytest.mark.serial
def test_split_parameters_are_gathered_and_never_the_batch(eight):
    """What devices exchange under fsdp depends on the parameters, so it hardly grows with the batch."""
    small, large = (sum(row["received"] for row in eight[name].values()) for name in ("fsdp", "fsdp_large_batch"))
    assert large < 1.1 * small
    assert "all-gather" in eight["fsdp"]


@pytest.mark.serial
def test_the_tensor_axis_splits_the_four_wide_kernels_of_a_block(eight):
    """Of 3 + 1 + 4 + 4 squares of 128 features in each of two blocks, in parameters, two moments and one average."""
    wide = 4 * 4 * 2 * 12 * 128**2
    whole = eight["state_bytes_tensor"]["1"]
    for tensor in (2, 4):
        saved = whole - eight["state_bytes_tensor"][str(tensor)]
        assert saved == wide // 2 - wide // (2 * tensor)


@pytest.mark.serial
@pytest.mark.parametrize(
    ("mesh", "state", "rows"),
    [("data", ("state_bytes", "1"), 8), ("fsdp", ("state_bytes", "8"), 8), ("all", ("state_bytes_tensor", "2"), 4)],
)
def test_the_compiler_plans_the_state_of_a_device_among_its_arguments(eight, mesh, state, rows):
    """And its rows of the batch, which is split over data x fsdp."""
    expected = eight[state[0]][state[1]] + eight["batch_bytes"] // rows
    assert 0 <= eight["arguments"][mesh] - expected <= 1024


@pytest.mark.serial
def test_devices_that_all_have_the_parameters_sample_without_a_word_to_each_other(eight):
    assert eight["sampling"] == {}


@pytest.mark.serial
def test_a_program_of_two_steps_does_everything_twice(eight):
    """It takes two batches, and one state."""
    one, two = eight["data"]["all-reduce"], eight["data_two_steps"]["all-reduce"]
    assert two["bytes"] == 2 * one["bytes"]
    assert eight["flops"]["data_two_steps"] == 2 * eight["flops"]["data"]
    assert eight["moved_bytes"]["data_two_steps"] >= 2 * eight["moved_bytes"]["data"]
    added = eight["arguments"]["data_two_steps"] - eight["arguments"]["data"]
    assert added == eight["batch_bytes"] // 8
