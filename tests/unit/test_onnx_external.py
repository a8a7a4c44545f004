"""External data of a graph: what is found, and what no artifact of ours can be."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from exporter.errors import ExporterError
from exporter.formats.onnx import external
from exporter.formats.onnx.external import Entry, read_initializers

DATA = "model.onnx.data"


def tensor(name="w", dims=(2, 3), dtype=TensorProto.FLOAT, **fields):
    """An initializer of 24 bytes at 0, or as `fields` say; a field that is None is left out."""
    found = TensorProto(name=name, data_type=dtype, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": DATA, "offset": "0", "length": "24", **fields}.items():
        if value is not None:
            found.external_data.add(key=key, value=value)
    return found


def model_of(*initializers, nodes=()):
    nodes = [helper.make_node("Identity", ["x"], ["y"]), *nodes]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def written(folder, *initializers, size=64, nodes=(), name="model.onnx"):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(model_of(*initializers, nodes=nodes).SerializeToString())
    (path.parent / DATA).write_bytes(bytes(range(size)))
    return path


def refusal(path, root=None):
    with pytest.raises(ExporterError) as caught:
        read_initializers(path, root or path.parent)
    assert "\n" not in caught.value.message
    assert caught.value.hint == "exporter quantize ... --overwrite makes it again"
    return caught.value.message


def test_what_is_there_is_found(tmp_path):
    inside = onnx.numpy_helper.from_array(np.ones(3, np.float32), "small")
    path = written(
        tmp_path,
        tensor("a"),
        inside,
        tensor("b", (3, 2, 4), TensorProto.UINT8, offset="24"),
        tensor("c", (5,), TensorProto.FLOAT8E8M0, offset="48", length="5"),
        tensor("d", (3,), TensorProto.INT4, offset="53", length="2"),
        tensor("none", (0, 4), offset="64", length="0"),
    )
    data = tmp_path / DATA
    assert read_initializers(path, tmp_path) == {
        "a": Entry(data, "float", (2, 3), 0, 24),
        "b": Entry(data, "uint8", (3, 2, 4), 24, 24),
        "c": Entry(data, "float8e8m0", (5,), 48, 5),
        "d": Entry(data, "int4", (3,), 53, 2),
        "none": Entry(data, "float", (0, 4), 64, 0),
    }


def test_the_bytes_are_those_that_onnx_loads(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    model = model_of(onnx.numpy_helper.from_array(values, "w"))
    settings = {"save_as_external_data": True, "location": DATA, "size_threshold": 0}
    onnx.save_model(model, tmp_path / "model.onnx", **settings)
    entry = read_initializers(tmp_path / "model.onnx", tmp_path)["w"]
    raw = entry.path.read_bytes()[entry.offset : entry.offset + entry.nbytes]
    assert np.frombuffer(raw, np.float32).reshape(entry.shape).tolist() == values.tolist()


def test_a_graph_in_a_folder_has_its_data_beside_it(tmp_path):
    path = written(tmp_path, tensor(), name="onnx/model_q4f16.onnx")
    assert read_initializers(path, tmp_path)["w"].path == tmp_path / "onnx" / DATA


def test_offset_and_length_may_be_left_out(tmp_path):
    assert read_initializers(written(tmp_path, tensor(offset=None, length=None)), tmp_path)["w"].nbytes == 24


HOSTILE = {
    "negative offset": (tensor(offset="-8"), "offset '-8', which is no count"),
    "offset in words": (tensor(offset="ten"), "offset 'ten'"),
    "offset in other digits": (tensor(offset="\u0663"), "offset '٣'"),
    "offset with a sign": (tensor(offset="+8"), "offset '+8'"),
    "offset of 200 digits": (tensor(offset="9" * 200), "no count of bytes"),
    "offset beyond the end": (tensor(offset="48"), "64 bytes; 'w' ends at 72"),
    "offset that would wrap": (tensor(offset=str(2**63 - 1)), "ends at"),
    "length too short": (tensor(length="20"), "'w' has 20 bytes; float [2, 3] takes 24"),
    "length too long": (tensor(length="28"), "takes 24"),
    "length negative": (tensor(length="-24"), "length '-24'"),
    "offset twice": (tensor(), "names its 'offset' twice"),
    "negative dims": (tensor(dims=(-2, -3)), "impossible dimensions [-2, -3]"),
    "dims of 2^62": (tensor(dims=(2**62, 4)), "impossible dimensions"),
    "a thousand dims": (tensor(dims=(1,) * 1000), "impossible dimensions [1, 1, 1, 1, 1, 1, 1, 1, 1]"),
    "many bytes": (tensor(dims=(2**40,) * 8, length=None), "ends at"),
    "strings": (tensor(dtype=TensorProto.STRING), "is of string"),
    "no type": (tensor(dtype=0), "is of undefined"),
    "a type of the future": (tensor(dtype=999), "is of type 999"),
    "no location": (tensor(location=None), "are at nowhere"),
    "absolute": (tensor(location="/etc/hostname"), "are at '/etc/hostname', which is no plain path"),
    "above": (tensor(location="../model.onnx.data"), "no plain path"),
    "above in disguise": (tensor(location="sub/../../x"), "no plain path"),
    "the folder itself": (tensor(location="."), "no plain path"),
    "drive letter": (tensor(location="C:data"), "no plain path"),
    "backslash": (tensor(location="..\\data"), "no plain path"),
    "memory address": (tensor(location="*/_ORT_MEM_ADDR_/*", offset="4096"), "no plain path"),
    "NUL": (tensor(location="model\0.data"), "no plain path"),
    "a folder": (tensor(location="folder"), "folder is not a regular file"),
    "through a file": (tensor(location="model.onnx.data/x"), "model.onnx.data/x is missing"),
    "very long name": (tensor(location="x" * 5000), "cannot be read"),
    "not there": (tensor(location="gone.data"), "gone.data is missing"),
    "no name": (tensor(name=""), "initializer '' has no name"),
    "bytes inside as well": (tensor(), "both inside and outside"),
    "external and yet not": (tensor(), "both inside and outside"),
}
HOSTILE["offset twice"][0].external_data.add(key="offset", value="0")
HOSTILE["bytes inside as well"][0].raw_data = bytes(24)
HOSTILE["external and yet not"][0].data_location = TensorProto.DEFAULT


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_entries_are_one_clear_line(tmp_path, case):
    one, told = HOSTILE[case]
    (tmp_path / "folder").mkdir()
    assert told in refusal(written(tmp_path, one))


@pytest.mark.parametrize(
    ("second", "told"),
    [
        (tensor("v", offset="0"), "'v' and 'w' share bytes of model.onnx.data"),
        (tensor("v", offset="16"), "'w' and 'v' share bytes"),
        (tensor("v", (1,), offset="20", length="4"), "share bytes"),
        (tensor("w", offset="24"), "initializer 'w' appears twice"),
        (onnx.numpy_helper.from_array(np.ones(1, np.float32), "w"), "initializer 'w' appears twice"),
    ],
)
def test_initializers_share_nothing(tmp_path, second, told):
    assert told in refusal(written(tmp_path, tensor(), second))


def test_neighbours_may_touch(tmp_path):
    assert len(read_initializers(written(tmp_path, tensor(), tensor("v", offset="24")), tmp_path)) == 2


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("Constant", [], ["c"], value=tensor("hidden")),
        helper.make_node(
            "If", ["x"], ["z"], then_branch=helper.make_graph([], "g", [], [], [tensor("hidden")]),
            else_branch=helper.make_graph([], "g", [], []),
        ),
        helper.make_node(
            "Loop", [], ["z"],
            body=helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor("hidden"))], "g", [], []),
        ),
    ],
    ids=lambda node: node.op_type,
)  # fmt: skip
def test_no_external_data_hide_in_nodes(tmp_path, node):
    assert "'hidden' has external data, but is no initializer" in refusal(written(tmp_path, tensor(), nodes=[node]))


def test_nor_in_functions_and_sparse_tensors(tmp_path):
    node = helper.make_node("Constant", [], ["c"], value=tensor("hidden"))
    model = model_of(tensor())
    model.functions.append(helper.make_function("d", "f", [], ["c"], [node], [helper.make_opsetid("", 21)]))
    path = written(tmp_path)
    path.write_bytes(model.SerializeToString())
    assert "'hidden'" in refusal(path)
    model = model_of()
    model.graph.sparse_initializer.add().values.CopyFrom(tensor("sparse"))
    path.write_bytes(model.SerializeToString())
    assert "'sparse'" in refusal(path)


def test_bottomless_graphs_end(tmp_path):
    node = helper.make_node("Identity", ["x"], ["z"])
    for _ in range(20):
        node = helper.make_node("If", ["x"], ["z"], then_branch=helper.make_graph([node], "g", [], []))
    assert "nested" in refusal(written(tmp_path, tensor(), nodes=[node]))


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "no model"), (b"PK\x03\x04" + bytes(60), "not an ONNX model"), (b"\x08\x0a", "no model")],
)
def test_what_is_no_model(tmp_path, content, told):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert told in refusal(path)


def test_a_model_cut_off(tmp_path):
    path = written(tmp_path, tensor())
    path.write_bytes(path.read_bytes()[:-3])
    assert "cut off" in refusal(path)


def test_a_graph_that_is_too_large_is_not_read(tmp_path):
    path = written(tmp_path)
    os.truncate(path, external.GRAPH_CAP + 1)  # sparse
    assert "its weights are not outside it" in refusal(path)


def test_files_that_are_not_files(tmp_path):
    assert "model.onnx is missing" in refusal(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").mkdir()
    assert "not a regular file" in refusal(tmp_path / "model.onnx")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path):
    path = written(tmp_path, tensor())
    (tmp_path / DATA).unlink()
    os.mkfifo(tmp_path / DATA)
    assert "not a regular file" in refusal(path)


@pytest.mark.parametrize("what", ["data", "graph", "folder"])
def test_links_are_not_followed(tmp_path, what):
    outside = tmp_path / "outside"
    root = tmp_path / "artifact"
    root.mkdir()
    path = written(root, tensor(), name="onnx/model.onnx")
    moved = {"data": path.parent / DATA, "graph": path, "folder": path.parent}[what]
    moved.rename(outside)
    moved.symlink_to(outside)
    assert f"{moved} is a symbolic link" in refusal(path, root)


def test_an_artifact_may_itself_be_behind_a_link(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    written(real, tensor())
    (tmp_path / "link").symlink_to(real)
    assert "w" in read_initializers(tmp_path / "link" / "model.onnx", tmp_path / "link")


@pytest.mark.parametrize("what", [DATA, "model.onnx"])
def test_a_second_name_is_refused(tmp_path, what):
    path = written(tmp_path, tensor())
    os.link(tmp_path / what, tmp_path / "other name")
    assert "is a hard link" in refusal(path)


def test_a_graph_outside_the_folder(tmp_path):
    path = written(tmp_path, tensor())
    (tmp_path / "artifact").mkdir()
    assert "outside the artifact's folder" in refusal(path, tmp_path / "artifact")
    assert "outside the artifact's folder" in refusal(Path(f"{tmp_path}/artifact/../model.onnx"), tmp_path / "artifact")
