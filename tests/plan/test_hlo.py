"""The reader of compiled programs."""

import pytest

from dsv3_jax.plan import hlo

TEXT = """HloModule jit_f, is_scheduled=true

FileNames
1 "/src/train/step.py"
2 "/src/model/block.py"

FunctionNames
1 "step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=3 end_line=3 column=55 end_column=58}
2 {file_name_id=2 function_name_id=1 line=9 end_line=9 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%body (state: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %state = (s32[], f32[8,4]{1,0}) parameter(0)
  %count = s32[] get-tuple-element(%state), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%state), index=1
  %fused = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%inner
  ROOT %next = (s32[], f32[8,4]{1,0}) tuple(%count, %fused)
}

ENTRY %main.1 (params.1: f32[8,4]) -> f32[8,4] {
  %params.1 = f32[8,4]{1,0} parameter(0), metadata={op_name="params[\\'w\\']"}
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,4]{1,0}) tuple(%zero, %params.1)
  %while.2 = (s32[], /*index=1*/f32[8,4]{1,0}) while(%start), condition=%cond, body=%body, metadata={op_name="jit(f)/while" stack_frame_id=2}, backend_config={"known_trip_count":{"n":"58"},"known_init_step":{"init":"0","step":"1"}}
  ROOT %out = f32[8,4]{1,0} get-tuple-element(%while.2), index=1
}
"""  # noqa: E501


def test_loop_is_read_with_its_trip_count_body_and_source():
    program = hlo.parse(TEXT)
    loop = program.instructions["while.2"]
    assert (program.entry, loop.trip_count, loop.body, loop.operands) == ("main.1", 58, "body", ("start",))
    assert program.files(loop) == ("/src/model/block.py", "/src/train/step.py"), "innermost call first"
    assert program.loop_of["body"] is loop


def test_argument_is_read_with_its_name_in_the_caller():
    parameter = hlo.parse(TEXT).instructions["params.1"]
    assert (parameter.op_name, parameter.index, parameter.num_bytes) == ("params['w']", 0, 8 * 4 * 4)


def test_loop_without_known_trip_count_has_none():
    program = hlo.parse(TEXT.replace('"known_trip_count":{"n":"58"},', ""))
    assert program.instructions["while.2"].trip_count is None


@pytest.mark.parametrize(
    ("type_", "num_bytes"),
    [
        ("f32[]", 4), ("bf16[3,5]{1,0}", 30), ("f8e4m3fn[7]{0}", 7), ("pred[2]", 2), ("s4[3]{0:E(4)}", 2),
        ("(s32[], /*index=1*/f32[2,3]{1,0:T(8,128)}, (u8[5]))", 4 + 24 + 5), ("f32[0,8]", 0), ("token[]", 0),
    ],
)  # fmt: skip
def test_type_has_the_bytes_of_all_its_arrays(type_, num_bytes):
    assert hlo.type_bytes(type_) == num_bytes


def test_elements_of_nested_tuple_are_split_at_its_own_commas():
    assert hlo.elements("((f32[2,3]{1,0}, s32[]), /*index=1*/u8[4]{0})") == ["(f32[2,3]{1,0}, s32[])", "u8[4]{0}"]


def test_short_form_of_a_tuple_element_is_the_element():
    program = hlo.parse(TEXT.replace("fusion(%x)", "fusion(%state#1)"))
    fused = program.instructions["fused"]
    element = program.instructions[fused.operands[0]]
    assert (element.opcode, element.operands, element.index) == ("get-tuple-element", ("state",), 1)
    assert element.num_bytes == 8 * 4 * 4 and program.computation_of[element.name] == "body"


def test_unknown_element_type_is_refused_by_name():
    with pytest.raises(ValueError, match="'f3'"):
        hlo.type_bytes("f3[2]")


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        hlo.parse("nothing of the kind")
