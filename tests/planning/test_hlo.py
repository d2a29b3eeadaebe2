import pytest

from dit_jax.planning import hlo

NOTE = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
LOOPS = f"""HloModule jit_step, is_scheduled=true

%inner_body (a: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %a = (s32[]{{:T(256)}}, f32[8]{{0:T(8)S(1)}}) parameter(0)
  %x = f32[8]{{0}} get-tuple-element(%a), index=1
  %f = f32[8]{{0}} fusion(%x), kind=kLoop, calls=%inside, {NOTE % 10}
  ROOT %t = (s32[], f32[8]) tuple(%x, %f)
}}

%inner_condition (b: (s32[], f32[8])) -> pred[] {{
  %b = (s32[], f32[8]) parameter(0)
  %limit = s32[] constant(3)
  ROOT %less = pred[] fusion(%b, %limit), kind=kLoop, calls=%compare
}}

%inside (p: f32[8]) -> f32[8] {{
  %p = f32[8] parameter(0)
  ROOT %n = f32[8] negate(%p), {NOTE % 999}
}}

%outer_body (c: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %c = (s32[], f32[8]) parameter(0)
  %w = (s32[], f32[8]) while(%c), condition=%inner_condition, body=%inner_body
  %y = f32[8]{{0}} get-tuple-element(%w), index=1
  %r = f32[8]{{0}} all-reduce(%y), replica_groups={{{{0,1}},{{2,3}}}}, to_apply=%add
  ROOT %t2 = (s32[], f32[8]) tuple(%y, %r)
}}

%outer_condition (d: (s32[], f32[8])) -> pred[] {{
  %d = (s32[], f32[8]) parameter(0)
  %turns = s32[]{{:T(128)}} constant(5)
  ROOT %less2 = pred[] compare(%d, %turns), direction=LT
}}

ENTRY %main (e: (s32[], f32[8])) -> f32[8] {{
  %e = (s32[], f32[8]) parameter(0)
  %copy = f32[8] copy(%e), {NOTE % 7}
  %loop = (s32[], f32[8]) while(%e), condition=%outer_condition, body=%outer_body
  ROOT %out = f32[8] get-tuple-element(%loop), index=1
}}
"""


def test_nested_loops_multiply_their_trip_counts():
    program = hlo.read(LOOPS)
    assert program.cycles == {"other": 7 + 5 * 3 * 10}  # inside a fusion is the fusion's
    assert program.collectives == [hlo.Collective("all-reduce", 8 * 4, 2, 5)]


def entry(*lines, before=""):
    return before + "\nENTRY %main (p: f32[4]) -> f32[4] {\n  " + "\n  ".join(lines) + "\n}\n"


@pytest.mark.parametrize(
    "groups, size",
    [
        ("replica_groups={{0,1},{2,3}}", 2),
        ("replica_groups={{0,1,2,3}}", 4),
        ("replica_groups=[64,4]<=[256]", 4),
        ("replica_groups=[16,16]<=[64,4]T(1,0)", 16),
        ("replica_groups=mesh['axis_0'=64,'axis_1'=4] {'axis_1'}", 4),
        ("replica_groups=mesh['axis_0'=64,'axis_1'=1,'axis_2'=4] {'axis_0','axis_2'}", 256),
        ("replica_groups=mesh['axis_0'=16,'axis_1'=4] {'axis_0':(1)4}", 4),
        ("replica_groups=mesh['axis_0'=16,'axis_1'=4] {'axis_0':(4)2,'axis_1'}", 8),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2], device_ids=(0,2,1,3) {'axis_1'}", 2),
        ("source_target_pairs={{0,1},{1,0}}", 2),
    ],
)
def test_group_size(groups, size):
    assert hlo.group_size(f"%x), channel_id=1, {groups}, dimensions={{0}}") == size


def test_bytes_of_tuples_and_of_started_collectives():
    text = entry(
        "%a = (bf16[3,4]{1,0:T(8,128)(2,1)}, f32[2]{0}) all-reduce(%x, %y), "
        "replica_groups=[1,8]<=[8]",
        "%b = (f32[4]{0}, f32[16]{0:T(8)}) all-gather-start(%x), replica_groups=[2,4]<=[8]",
        "%b2 = f32[16]{0} all-gather-done(%b)",
        "%c = (s8[6]{0}, s8[6]{0}, u32[], u32[]) collective-permute-start(%x), "
        "source_target_pairs={{0,1},{1,0}}",
        "%d = f32[4]{0} reduce-scatter(%x), replica_groups={{0,1,2,3}}, to_apply=%add",
        "%e = pred[8]{0} all-to-all(%x), replica_groups={{0,1,2,3}}",
        "%f = (f32[8]{0}) all-reduce-start(%x), replica_groups={{0,1}}",
    )
    found = {each.kind: each for each in hlo.read(text).collectives[:-1]}
    assert {kind: (each.num_bytes, each.group) for kind, each in found.items()} == {
        "all-reduce": (3 * 4 * 2 + 2 * 4, 8),
        "all-gather": (64, 4),
        "collective-permute": (6, 2),
        "reduce-scatter": (16, 4),
        "all-to-all": (8, 4),
    }
    assert {kind: each.wire_bytes for kind, each in found.items()} == {
        "all-reduce": 32 * 2 * 7 / 8,
        "all-gather": 64 * 3 / 4,
        "collective-permute": 6,
        "reduce-scatter": 16 * 3,
        "all-to-all": 8 * 3 / 4,
    }
    assert hlo.read(text).collectives[-1] == hlo.Collective("all-reduce", 32, 2, 1)


def test_an_asynchronous_call_counts_its_computation_once():
    wrapped = f"""
%wrapped (q: f32[4]) -> f32[16] {{
  %q = f32[4] parameter(0)
  ROOT %g = f32[16]{{0}} all-gather(%q), replica_groups=[1,4]<=[4], {NOTE % 5}
}}
"""
    text = entry(
        "%s = ((f32[4]), f32[16], u32[]) async-start(%p), calls=%wrapped",
        "%u = ((f32[4]), f32[16], u32[]) async-update(%s)",
        "%d = f32[16] async-done(%u), calls=%wrapped",
        before=wrapped,
    )
    program = hlo.read(text)
    assert program.collectives == [hlo.Collective("all-gather", 64, 4, 1)]
    assert not program.cycles  # links have their own time


def test_a_sliced_all_reduce_is_a_reduce_scatter():
    fused = """
%all-reduce-scatter.1 (q: f32[16]) -> f32[4] {
  %q = f32[16] parameter(0)
  %r = f32[16]{0} all-reduce(%q), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %s = f32[4]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={4}
}
"""
    text = entry(
        "%f = f32[4]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1", before=fused
    )
    assert hlo.read(text).collectives == [hlo.Collective("reduce-scatter", 16, 4, 1)]


@pytest.mark.parametrize(
    "type, size",
    [("f32[2,3]{1,0}", 24), ("bf16[]", 2), ("pred[5]", 5), ("s4[4]", 2), ("f8e4m3fn[3]", 3)]
    + [("(f32[2]{0:T(8)S(1)}, (s32[3], u8[1]))", 8 + 12 + 1), ("token[]", 0)],
)
def test_bytes_of_a_type(type, size):
    assert hlo.size(type) == size


def test_a_collective_beside_several_fusions_counts_once():
    part = """
%%async_collective_fusion.%d (q: f32[4]) -> f32[16] {
  %%q = f32[4] parameter(0)
  ROOT %%g = f32[16]{0} all-gather(%%q), channel_id=7, replica_groups=[1,4]<=[4]
}
"""
    text = entry(
        "%f = f32[16]{0} fusion(%p), kind=kCustom, calls=%async_collective_fusion.1",
        "%g = f32[16]{0} fusion(%p), kind=kCustom, calls=%async_collective_fusion.2",
        before=part % 1 + part % 2,
    )
    assert hlo.read(text).collectives == [hlo.Collective("all-gather", 64, 4, 1, "7")]


@pytest.mark.parametrize("type", ["s32[]{:T(128)}", "u32[]"])
def test_trip_count_of_a_loop(type):
    assert hlo.trip_count({"limit": hlo.Instruction(type, "constant", "8), metadata={}")}) == 8


@pytest.mark.parametrize("constants", [[], [3, 4]])
def test_a_loop_with_an_unknown_trip_count_is_refused(constants):
    lines = {
        f"c{i}": hlo.Instruction("s32[]", "constant", f"{n})") for i, n in enumerate(constants)
    }
    with pytest.raises(ValueError, match="condition must have one constant"):
        hlo.trip_count(lines)


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="must be a compiled module"):
        hlo.read("nothing")
    with pytest.raises(ValueError, match="must name its groups"):
        hlo.read(entry("%a = f32[4] all-reduce(%p), to_apply=%add"))


@pytest.mark.parametrize(
    "branches",
    ["branch_computations={%short, %long}", "true_computation=%long, false_computation=%short"],
)
def test_of_a_conditional_the_longest_branch_counts(branches):
    before = "\n".join(
        f"%{name} (q: f32[4]) -> f32[4] {{\n  ROOT %n = f32[4] negate(%q), {NOTE % cycles}\n}}\n"
        for name, cycles in (("short", 3), ("long", 40))
    )
    text = entry(f"ROOT %c = f32[4] conditional(%i, %p, %p), {branches}", before=before)
    assert hlo.read(text).cycles == {"other": 40}


def test_cycles_are_counted_by_what_they_compute():
    before = """%fused (q: f32[4]) -> f32[4] {
  ROOT %n = f32[4] convolution(%q, %q), window={}, dim_labels=bf_io->bf
}
"""
    scoped = 'metadata={op_name="jit(train_step)/transpose(jvp(attention))/exp"}'
    text = entry(
        f"%a = f32[4] fusion(%p), calls=%fused, {NOTE % 5}",
        f"%b = f32[4] negate(%a), {NOTE % 2}",
        f"%c = f32[4] fusion(%b), calls=%fused, {scoped}, {NOTE % 30}",
        f"%d = f32[4] dot(%c, %c), {NOTE % 7}",
        'ROOT %e = f32[4] add(%d, %d), metadata={op_name="jit(step)/dynamic_update_slice"}, '
        + NOTE % 11,
        before=before,
    )
    assert hlo.read(text).cycles == {"products": 12, "other": 13, "attention": 30}
