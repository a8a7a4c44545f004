"""What the linter says of graphs that TensorRT refuses, of their twins, and of files that are out to harm it."""

import os
import subprocess
import sys

import numpy as np
import pytest
from onnx import TensorProto as T
from onnx import helper

from exporter.errors import ExporterError, MissingExtra, Refused
from exporter.validate import onnx_file
from exporter.validate.tensorrt_rules import Finding, findings, lint, require_buildable
from tests.tensorrt_cases import CASES, SMS, TWINS
from tests.tensorrt_graphs import BLOCK, K, N, Net, branches, dequantized, gathered, one, outside, rotated


def written(folder, model, data=b"", name="decode.onnx"):
    path = folder / name
    path.write_bytes(model.SerializeToString())
    if data:
        (folder / "weights.data").write_bytes(data)
    return path


@pytest.mark.parametrize("name", CASES)
def test_it_is_found(tmp_path, name):
    case = CASES[name]
    found = findings(written(tmp_path, case.model, case.data))
    hits = [f for f in found if f.rule == case.rule and case.told in f.problem]
    assert hits, found
    assert {(f.sms, f.fatal) for f in hits} == {(case.sms, case.fatal)}
    refused = {sm for f in found if f.fatal for sm in f.sms}
    assert refused == (set(case.sms) if case.fatal else set())
    assert all(f.where and "\n" not in f.where + f.problem for f in found)


@pytest.mark.parametrize("name", TWINS)
def test_its_twin_is_let_through(tmp_path, name):
    assert findings(written(tmp_path, TWINS[name])) == []


def test_a_child_says_the_same(tmp_path):
    path = written(tmp_path, gathered())
    assert lint(path) == findings(path)
    assert lint(path) == [Finding("/DequantizeLinear_0 (DequantizeLinear)", "INT4 is not there on SM75", (75,), "sm")]


def test_what_builds_where(tmp_path):
    path = written(tmp_path, gathered())
    for sm in SMS[1:]:
        require_buildable(path, sm)
    with pytest.raises(Refused) as caught:
        require_buildable(path, 75)
    assert caught.value.message == (
        "decode.onnx: /DequantizeLinear_0 (DequantizeLinear): INT4 is not there on SM75 (SM75)"
    )
    assert caught.value.hint


def test_warnings_refuse_nothing(tmp_path):
    require_buildable(written(tmp_path, CASES["an expert in If"].model), 75)


# Values are looked at, wherever they are


def test_scales_outside(tmp_path):
    assert findings(written(tmp_path, *outside())) == []


def test_a_scale_in_the_last_piece(tmp_path):
    channels = 5 * onnx_file.PIECE // 4
    node = helper.make_node("DequantizeLinear", ["codes", "scales"], ["y"], axis=1)
    codes, scales = T(name="codes", data_type=T.INT8), T(name="scales", data_type=T.FLOAT16, dims=[channels])
    codes.dims.extend([1, channels])
    for tensor, offset, length in ((codes, 0, channels), (scales, channels, 2 * channels)):
        tensor.data_location = T.EXTERNAL
        for key, text in (("location", "weights.data"), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=text)
    made = helper.make_tensor_value_info("y", T.FLOAT16, [1, channels])
    graph = helper.make_graph([node], "g", [], [made], [codes, scales])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    good = np.ones(channels, "<f2")
    assert findings(written(tmp_path, model, bytes(channels) + good.tobytes())) == []
    good[-1] = -good[-1]
    (found,) = findings(written(tmp_path, model, bytes(channels) + good.tobytes()))
    assert "not above zero" in found.problem


def test_shapes_outside(tmp_path):
    net = Net()
    rows = net.node("Reshape", net.input(), net.ints(2, 2 * K))
    model = net.model(net.node("MatMul", rows, net.input("y", (2 * K, 4))))
    (tensor,) = model.graph.initializer
    data = bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = T.EXTERNAL
    tensor.external_data.add(key="location", value="weights.data")
    assert findings(written(tmp_path, model, data)) == []
    (found,) = findings(written(tmp_path, model, np.array([4, K]).tobytes()))
    assert "not valid ONNX" in found.problem


def test_numbers_in_fields_of_their_own(tmp_path):
    """float16 as int32_data, as helper.make_tensor writes it."""
    model = dequantized()
    tensor = next(t for t in model.graph.initializer if t.name == "scales")
    for scale, bad in ((0.01, False), (0.0, True)):
        values = [0.01] * (K // BLOCK * N - 1) + [scale]
        tensor.CopyFrom(helper.make_tensor("scales", T.FLOAT16, (K // BLOCK, N), values))
        assert not tensor.raw_data
        assert any("not above zero" in f.problem for f in findings(written(tmp_path, model))) == bad


# Nothing hides


def test_not_in_a_branch(tmp_path):
    net = Net()
    x = net.input()
    model = net.model(branches(net, x, [("BitwiseNot", [x]), "Relu"]))
    assert ("unsupported", SMS) in [(f.rule, f.sms) for f in findings(written(tmp_path, model))]


def test_weights_of_the_outer_graph_are_known_in_a_branch(tmp_path):
    net = Net()
    x, weight = net.input(shape=(K, N)), net.weight((K, N), T.INT8)
    model = net.model(branches(net, x, [("Identity", [weight]), "Relu"]))
    told = [f.problem for f in findings(written(tmp_path, model)) if f.fatal]
    assert "an INT8 constant must go to DequantizeLinear directly" in told


def test_branches(tmp_path):
    net = Net()
    model = net.model(branches(net, net.input(), ["Relu", "Neg"]))
    broken = type(model).FromString(model.SerializeToString())
    del broken.graph.node[0].attribute[1]
    assert "a branch is missing" in str(findings(written(tmp_path, broken)))
    for attribute in model.graph.node[0].attribute:
        attribute.g.node[0].op_type, attribute.g.node[0].domain = "SkipSimplifiedLayerNormalization", "com.microsoft"
    model.opset_import.add(domain="com.microsoft", version=1)
    assert "values of unknown shape" in str(findings(written(tmp_path, model)))


def test_bodies(tmp_path):
    model = TWINS["Loop"]
    broken = type(model).FromString(model.SerializeToString())
    (body,) = broken.graph.node[0].attribute
    body.g.input[2].type.tensor_type.ClearField("shape")
    body.g.node[1].CopyFrom(helper.make_node("Reshape", ["a", "a_shape"], ["b"]))
    body.g.input.add(name="a_shape").type.tensor_type.elem_type = T.INT64
    body.g.output[1].type.tensor_type.ClearField("shape")
    assert "shapes of carried values that are not known" in str(findings(written(tmp_path, broken)))
    del broken.graph.node[0].attribute[:]
    assert "its body is missing" in str(findings(written(tmp_path, broken)))


def test_codes_of_any_length(tmp_path):
    for attributes, shape, told in (({}, (), 0), ({"axis": 0, "block_size": BLOCK}, (2, N), 1)):
        net = Net()
        codes = net.input("x", ("n", N), T.INT8)
        made = net.node("DequantizeLinear", codes, net.weight(np.full(shape, 0.01)), **attributes)
        found = findings(written(tmp_path, net.model(made)))
        assert len([f for f in found if "of unknown shapes" in f.problem and not f.fatal]) == len(found) == told


def test_microscaled_inputs(tmp_path):
    net = Net()
    codes, scales = net.input("x", (N, K), T.FLOAT8E4M3FN), net.weight((N, K // 32), T.UINT8)
    attributes = {"axis": -1, "block_size": 32, "output_dtype": T.FLOAT16}
    model = net.model(net.node("TRT_MXFP8DequantizeLinear", codes, scales, domain="trt", **attributes))
    assert "codes or scales that are no constant" in str(findings(written(tmp_path, model)))


def test_unknown_types_are_said(tmp_path):
    """SkipSimplifiedLayerNormalization is no operator of ONNX's, so what it makes has no type to look at."""
    net = Net()
    given = net.input("x", (1, 4, K)), net.input("s", (1, 4, K)), net.input("g", (K,))
    made = net.node("SkipSimplifiedLayerNormalization", *given, domain="com.microsoft")
    (found,) = findings(written(tmp_path, net.model(net.node("Relu", made))))
    assert (found.rule, found.fatal) == ("types", False)
    assert "what follows is not checked" in found.problem
    model = rotated()
    model.graph.input[0].ClearField("type")
    assert "has no type" in str(findings(written(tmp_path, model)))


# Out to harm


def refusal(tmp_path, model, data=b"", kind=ExporterError):
    with pytest.raises(kind) as caught:
        findings(written(tmp_path, model, data))
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value.message


def test_a_graph_that_kills_its_reader(tmp_path):
    """ONNX 1.23's inference aborts at it; a library that does not is as good."""
    model = one("Split", ("x", (4, K)), outs=2, axis=1, num_outputs=2)
    for attribute in model.graph.node[0].attribute:
        if attribute.name == "num_outputs":
            attribute.type = 7  # INTS
    path = written(tmp_path, model)
    try:
        found = lint(path)
    except ExporterError as error:
        assert "onnx was killed by SIGABRT while running decode.onnx" in error.message  # noqa: PT017
        assert "\n" not in error.message  # noqa: PT017
    else:
        assert [f.rule for f in found if f.fatal] == ["attributes"]


def test_names_of_several_lines(tmp_path):
    model = one("Frob", ("x", (4, K)))
    model.graph.node[0].name = "a\nb\x1b[31m"
    (found,) = findings(written(tmp_path, model))
    assert found.where == "a?b?[31m (Frob)"


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("location", "../weights.data", "no plain path below its folder"),
        ("location", "/etc/hostname", "no plain path below its folder"),
        ("location", "", "no plain path below its folder"),
        ("location", "other.data", "is missing"),
        ("offset", "-1", "for a count of bytes"),
        ("offset", "999", "ends at 1,127 of the 192 bytes"),
        ("length", "3", "has 3 bytes, not 128"),
    ],
)
def test_weights_elsewhere(tmp_path, key, value, told):
    model, data = outside()
    tensor = next(t for t in model.graph.initializer if t.name == "scales")
    for field in tensor.external_data:
        if field.key == key:
            field.value = value
    assert told in refusal(tmp_path, model, data)


def test_weights_behind_links(tmp_path):
    model, data = outside()
    real = tmp_path / "real.data"
    real.write_bytes(data)
    (tmp_path / "weights.data").symlink_to(real)
    assert "a symbolic link" in refusal(tmp_path, model)
    (tmp_path / "weights.data").unlink()
    os.link(real, tmp_path / "weights.data")
    assert "no plain file of one name" in refusal(tmp_path, model)


@pytest.mark.parametrize(
    ("dims", "told"),
    [((1 << 62, 1 << 62), "impossible dimensions"), ((-1, N), "impossible dimensions"), ((0, N), "128 bytes, not 0")],
)
def test_impossible_shapes(tmp_path, dims, told):
    model, data = outside()
    tensor = next(t for t in model.graph.initializer if t.name == "scales")
    tensor.dims[:] = dims
    assert told in refusal(tmp_path, model, data)


def test_bottomless_graphs_end(tmp_path):
    node = helper.make_node("Relu", ["x"], ["y"])
    for _ in range(20):
        inner = helper.make_graph([node], "g", [], [helper.make_tensor_value_info("y", T.FLOAT16, None)])
        node = helper.make_node("If", ["c"], ["y"], then_branch=inner)
    model = one("Relu", ("x", (4, K)))
    model.graph.node[0].CopyFrom(node)
    assert "nested more than 16 deep" in refusal(tmp_path, model)


def test_functions_that_call_each_other(tmp_path):
    model = one("F", ("x", (4, K)), domain="own")
    for name, other in (("F", "G"), ("G", "F")):
        call = helper.make_node(other, ["x"], ["y"], domain="own")
        opsets = [helper.make_opsetid("own", 1)]
        model.functions.append(helper.make_function("own", name, ["x"], ["y"], [call], opsets))
    assert "functions" in {f.rule for f in findings(written(tmp_path, model))}


def test_sparse_weights(tmp_path):
    model = one("Relu", ("x", (4, K)))
    values, indices = helper.make_tensor("v", T.FLOAT16, [1], [1.0]), helper.make_tensor("i", T.INT64, [1], [1])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [K]))
    assert "is sparse" in [f.problem for f in findings(written(tmp_path, model))]


def test_an_attribute_of_no_function(tmp_path):
    model = one("Softmax", ("x", (4, K)))
    model.graph.node[0].attribute.add(name="axis", ref_attr_name="which", type=2)
    assert "decided where its function is called" in str(findings(written(tmp_path, model)))


def test_more_findings_than_anyone_reads(tmp_path):
    net = Net()
    x = net.input()
    net.nodes = [helper.make_node("Frob", [x], [f"v{i}"]) for i in range(20_000)]
    found = findings(written(tmp_path, net.model("v0")))
    assert len(found) == 10_001
    assert found[-1].problem == "has more than 10,000 findings; these are the first"


def test_no_file_and_no_library(tmp_path, monkeypatch):
    with pytest.raises(ExporterError, match="is missing"):
        lint(tmp_path / "decode.onnx")
    (tmp_path / "decode.onnx").write_bytes(b"\xff" * 60)
    with pytest.raises(ExporterError, match="not an ONNX model"):
        lint(tmp_path / "decode.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtra, match="onnx"):
        lint(tmp_path / "decode.onnx")


def test_it_needs_no_tensorrt(tmp_path):
    path = written(tmp_path, gathered())
    code = (
        "import sys; from pathlib import Path; sys.modules['tensorrt_rtx'] = sys.modules['tensorrt'] = None;"
        "from exporter.validate.tensorrt_rules import findings; print(len(findings(Path(sys.argv[1]))))"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0
