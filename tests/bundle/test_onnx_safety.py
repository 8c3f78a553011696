"""check_onnx_safe: each kind of hostile content, in each place of a model that can hold it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from moe_export.bundle import check_onnx_safe
from moe_export.errors import BundleError
from tests.bundle.sample import external_tensor, make_model


def _graph(name: str, tensor: TensorProto | None = None) -> onnx.GraphProto:
    node = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.ones(1, np.float32), "c"))
    out = helper.make_tensor_value_info("c", TensorProto.FLOAT, None)
    return helper.make_graph([node], name, [], [out], [tensor] if tensor is not None else [])


def _in_initializer(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.graph.initializer.append(tensor)


def _in_constant(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["k"], value=tensor))


def _in_tensor_list(model: onnx.ModelProto, tensor: TensorProto) -> None:
    node = helper.make_node("Own", [], ["k"], domain="own")
    attribute = onnx.AttributeProto(name="many", type=onnx.AttributeProto.TENSORS)
    attribute.tensors.append(tensor)
    node.attribute.append(attribute)
    model.graph.node.append(node)


def _in_if(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.graph.node.append(
        helper.make_node("If", ["b"], ["k"], then_branch=_graph("then"), else_branch=_graph("else", tensor))
    )


def _in_loop_in_if(model: onnx.ModelProto, tensor: TensorProto) -> None:
    outer = _graph("then")
    outer.node.append(helper.make_node("Loop", ["n", "b"], ["k"], body=_graph("body", tensor)))
    model.graph.node.append(helper.make_node("If", ["b"], ["k"], then_branch=outer, else_branch=_graph("e")))


def _in_function(model: onnx.ModelProto, tensor: TensorProto) -> None:
    node = helper.make_node("Constant", [], ["k"], value=tensor)
    model.functions.append(helper.make_function("own", "F", [], ["k"], [node], [helper.make_opsetid("", 20)]))


def _in_function_default(model: onnx.ModelProto, tensor: TensorProto) -> None:
    node = helper.make_node("Identity", ["x"], ["k"])
    default = helper.make_attribute("value", tensor)
    model.functions.append(
        helper.make_function("own", "F", ["x"], ["k"], [node], [helper.make_opsetid("", 20)], [], [default])
    )


def _in_sparse_values(model: onnx.ModelProto, tensor: TensorProto) -> None:
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(tensor)
    sparse.dims.append(99)


def _in_sparse_indices(model: onnx.ModelProto, tensor: TensorProto) -> None:
    sparse = model.graph.sparse_initializer.add()
    sparse.values.name = "s"
    sparse.indices.CopyFrom(tensor)


def _in_sparse_attribute(model: onnx.ModelProto, tensor: TensorProto) -> None:
    node = helper.make_node("Constant", [], ["k"])
    attribute = onnx.AttributeProto(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR)
    attribute.sparse_tensor.values.CopyFrom(tensor)
    node.attribute.append(attribute)
    model.graph.node.append(node)


def _in_training(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.training_info.add().initialization.CopyFrom(_graph("init", tensor))


Place = Callable[[onnx.ModelProto, TensorProto], None]
PLACES: tuple[Place, ...] = (
    _in_initializer,
    _in_constant,
    _in_tensor_list,
    _in_if,
    _in_loop_in_if,
    _in_function,
    _in_function_default,
    _in_sparse_values,
    _in_sparse_indices,
    _in_sparse_attribute,
    _in_training,
)


def _prepare(folder: Path) -> None:
    (folder.parent / "secret").write_bytes(bytes(1000))
    (folder / "weights.bin").write_bytes(bytes(80))
    (folder / "inside").mkdir()
    (folder / "inside" / "w").write_bytes(bytes(80))
    (folder / "link").symlink_to("../secret")
    (folder / "folder-link").symlink_to("..")
    (folder / "good-link").symlink_to("weights.bin")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")


def _write(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    _prepare(folder)
    return folder


def _twice(key: str) -> TensorProto:
    tensor = external_tensor("t", "weights.bin", offset="0")
    tensor.external_data.add(key=key, value="0")
    return tensor


def _negative_dims() -> TensorProto:
    tensor = external_tensor("t", "weights.bin")
    tensor.dims[0] = -4
    return tensor


def _typed(kind: int) -> TensorProto:
    tensor = external_tensor("t", "weights.bin")
    tensor.data_type = kind
    return tensor


def _without_location() -> TensorProto:
    tensor = external_tensor("t", "weights.bin")
    del tensor.external_data[:]
    return tensor


def _external_but_not_said() -> TensorProto:
    tensor = external_tensor("t", "../secret")
    tensor.data_location = TensorProto.DEFAULT
    return tensor


HOSTILE: dict[str, tuple[TensorProto, str]] = {
    "absolute": (external_tensor("t", "/etc/passwd"), "'/etc/passwd' is absolute"),
    "drive": (external_tensor("t", "C:/x"), "is absolute"),
    "parent": (external_tensor("t", "../secret"), r"contains '\.\.'"),
    "parent-inside": (external_tensor("t", "inside/../../secret"), r"contains '\.\.'"),
    "backslash": (external_tensor("t", "..\\secret"), "contains a backslash"),
    "nul": (external_tensor("t", "weights.bin\0x"), r"control character U\+0000"),
    "link": (external_tensor("t", "link"), "a link that leaves the folder"),
    "folder-link": (external_tensor("t", "folder-link/secret"), "a link that leaves the folder"),
    "link-loop": (external_tensor("t", "loop"), "cannot be read"),
    "missing": (external_tensor("t", "nothing.bin"), "'nothing.bin' does not exist"),
    "memory-address": (external_tensor("t", "*/_ORT_MEM_ADDR_/*", offset="94113"), "does not exist"),
    "empty": (external_tensor("t", ""), "is empty"),
    "no-location": (_without_location(), "is empty"),
    "folder": (external_tensor("t", "inside"), "is not a file"),
    "pipe": (external_tensor("t", "pipe"), "is not a file"),
    "long-name": (external_tensor("t", "n" * 300), "cannot be read"),
    "past-the-end": (external_tensor("t", "weights.bin", offset="17"), "ends at byte 81 .* has 80 bytes"),
    "huge-offset": (external_tensor("t", "weights.bin", offset=str(2**62)), "ends at byte 46"),
    "offset-overflow": (external_tensor("t", "weights.bin", offset="9" * 30), "is not a number of 0 or more"),
    "negative-offset": (external_tensor("t", "weights.bin", offset="-1"), "offset '-1' is not a number"),
    "negative-length": (external_tensor("t", "weights.bin", length="-64"), "length '-64' is not a number"),
    "odd-digits": (external_tensor("t", "weights.bin", offset="\u0664"), "is not a number"),
    "space": (external_tensor("t", "weights.bin", offset=" 1"), "is not a number"),
    "wrong-length": (external_tensor("t", "weights.bin", length="60"), "length 60, the tensor needs 64"),
    "huge-shape": (external_tensor("t", "weights.bin", (2**40, 2**40)), "ends at byte"),
    "twice": (_twice("offset"), "gives 'offset' twice"),
    "unknown-key": (_twice("basepath"), "unknown key 'basepath'"),
    "negative-dims": (_negative_dims(), r"\[-4, 4\] are negative"),
    "strings": (_typed(TensorProto.STRING), "type STRING cannot have external data"),
    "unknown-type": (_typed(99), "type 99 cannot have external data"),
    "hidden": (_external_but_not_said(), r"contains '\.\.'"),
}


def refusal(path: Path) -> str:
    """The message check_onnx_safe refuses a model with, or "accepted"."""
    try:
        check_onnx_safe(path)
    except BundleError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_external_data(folder: Path, kind: str) -> None:
    tensor, message = HOSTILE[kind]
    for place in PLACES:
        model = make_model()
        place(model, tensor)
        found = refusal(_write(folder, model))
        assert re.search(message, found), f"{place.__name__}: {found}"


@pytest.mark.parametrize(
    "tensor",
    [
        external_tensor("t", "weights.bin"),
        external_tensor("t", "weights.bin", offset="16", length="64", checksum="ab"),
        external_tensor("t", "inside/w", (20,)),
        external_tensor("t", "good-link"),
        external_tensor("t", "weights.bin", (0, 5), offset="80"),
        external_tensor("t", "weights.bin", ()),
        numpy_helper.from_array(np.zeros((2, 2), np.float32), "t"),
    ],
    ids=["plain", "bounds", "subfolder", "link-inside", "no-elements", "scalar", "inline"],
)
def test_sound_tensors_pass_in_each_place(folder: Path, tensor: TensorProto) -> None:
    for place in PLACES:
        model = make_model()
        place(model, tensor)
        found = refusal(_write(folder, model))
        assert found == "accepted", f"{place.__name__}: {found}"


@pytest.mark.parametrize(
    ("data_type", "nbytes"),
    [
        (TensorProto.INT4, 8),
        (TensorProto.UINT2, 4),
        (TensorProto.FLOAT6E2M3, 12),
        (TensorProto.BFLOAT16, 32),
        (TensorProto.COMPLEX64, 128),
        (TensorProto.BOOL, 16),
    ],
)
def test_sizes_of_dtypes(folder: Path, data_type: int, nbytes: int) -> None:
    (folder / "weights.bin").write_bytes(bytes(nbytes + 80))
    model = make_model()
    tensor = external_tensor("t", "weights.bin", length=str(nbytes))
    tensor.data_type = data_type
    model.graph.initializer.append(tensor)
    check_onnx_safe(_write(folder, model))
    tensor.external_data[1].value = str(nbytes + 1)
    model.graph.initializer[1].CopyFrom(tensor)
    with pytest.raises(BundleError, match=f"the tensor needs {nbytes} bytes"):
        check_onnx_safe(_write(folder, model))


def test_every_dtype_of_onnx_has_a_size() -> None:
    from moe_export.bundle.onnx_safety import _BITS

    without_bytes = {"UNDEFINED", "STRING"}
    assert set(_BITS) == set(TensorProto.DataType.keys()) - without_bytes


BAD_NAMES = {
    "nul": "a\0b",
    "newline": "a\nb",
    "escape": "a\x1b[31mb",
    "delete": "a\x7f",
    "c1": "a\x9bb",
    "bidi": "a\u202eb",
    "line-separator": "a\u2028b",
    "parent": "../../etc/x",
    "backslash": "..\\x",
    "long": "n" * 5000,
}


def _name_places(model: onnx.ModelProto, name: str) -> dict[str, Callable[[], object]]:
    graph = model.graph
    return {
        "initializer": lambda: graph.initializer.append(
            numpy_helper.from_array(np.ones(1, np.float32), name)
        ),
        "node": lambda: setattr(graph.node[0], "name", name),
        "node-input": lambda: graph.node[0].input.append(name),
        "node-output": lambda: graph.node[0].output.append(name),
        "op-type": lambda: setattr(graph.node[0], "op_type", name),
        "domain": lambda: setattr(graph.node[0], "domain", name),
        "attribute": lambda: graph.node[0].attribute.append(helper.make_attribute(name, 1)),
        "graph": lambda: setattr(graph, "name", name),
        "graph-input": lambda: setattr(graph.input[0], "name", name),
        "graph-output": lambda: setattr(graph.output[0], "name", name),
        "value-info": lambda: graph.value_info.append(helper.make_tensor_value_info(name, 1, None)),
        "dimension": lambda: setattr(graph.input[0].type.tensor_type.shape.dim[0], "dim_param", name),
        "subgraph": lambda: _in_if(model, numpy_helper.from_array(np.ones(1, np.float32), name)),
        "function": lambda: model.functions.append(helper.make_function("own", name, [], [], [], [])),
        "function-node": lambda: model.functions.append(
            helper.make_function("own", "F", [], [], [helper.make_node("Abs", [name], ["y"])], [])
        ),
        "opset-domain": lambda: model.opset_import.append(helper.make_opsetid(name, 1)),
        "metadata-key": lambda: model.metadata_props.add(key=name, value="x"),
    }


@pytest.mark.parametrize("kind", BAD_NAMES)
def test_hostile_names(folder: Path, kind: str) -> None:
    for place in _name_places(make_model(), ""):
        model = make_model()
        _name_places(model, BAD_NAMES[kind])[place]()
        found = refusal(_write(folder, model))
        assert re.search("control character|path part|backslash|characters long", found), f"{place}: {found}"
        assert found.isprintable()


def test_names_that_are_not_utf8(folder: Path) -> None:
    for name in ("/layers.0/matmul", "weights.bin", "offset"):
        content = make_model().SerializeToString()
        assert content.count(name.encode()) == 1
        path = folder / "model.onnx"
        path.write_bytes(content.replace(name.encode(), b"\xff" * len(name)))
        assert "a name is not UTF-8" in refusal(path)


@pytest.mark.parametrize("name", ["/model/layers.0/MatMul_output_0", "moe.0.hidden", "größe", "a..b", "a b"])
def test_ordinary_names_pass(folder: Path, name: str) -> None:
    for place in _name_places(make_model(), name):
        model = make_model()
        _name_places(model, name)[place]()
        check_onnx_safe(_write(folder, model))


def test_prose_may_hold_what_names_may_not(folder: Path) -> None:
    model = make_model()
    model.doc_string = "line\nline\t../x"
    model.graph.node[0].metadata_props.add(key="trace", value='File "..\\x.py"\n  line 1')
    check_onnx_safe(_write(folder, model))


def test_initializer_names(folder: Path) -> None:
    model = make_model()
    model.graph.initializer.append(model.graph.initializer[0])
    with pytest.raises(BundleError, match="initializer 'w' is defined twice"):
        check_onnx_safe(_write(folder, model))
    model = make_model()
    _in_sparse_values(model, external_tensor("w", "weights.bin"))
    with pytest.raises(BundleError, match="initializer 'w' is defined twice"):
        check_onnx_safe(_write(folder, model))
    model = make_model()
    _in_if(model, external_tensor("w", "weights.bin"))
    check_onnx_safe(_write(folder, model))  # another graph, another scope
    model.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), ""))
    with pytest.raises(BundleError, match="has no name"):
        check_onnx_safe(_write(folder, model))


def test_node_that_loads_a_file(folder: Path) -> None:
    model = make_model()
    model.graph.node.append(helper.make_node("EPContext", [], ["k"], domain="com.microsoft"))
    with pytest.raises(BundleError, match="EPContext"):
        check_onnx_safe(_write(folder, model))


def test_not_an_onnx_file(folder: Path) -> None:
    path = folder / "model.onnx"
    with pytest.raises(BundleError, match="cannot be read"):
        check_onnx_safe(path)
    path.write_bytes(b"")
    with pytest.raises(BundleError, match="it has no graph"):
        check_onnx_safe(path)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(BundleError, match="not a valid ONNX file"):
        check_onnx_safe(path)
    with path.open("wb") as stream:
        stream.truncate(1 << 31)
    with pytest.raises(BundleError, match="larger than 2 GiB"):
        check_onnx_safe(path)


def test_root_and_allowed(folder: Path) -> None:
    inner = folder / "inside"
    (inner / "weights.bin").write_bytes(bytes(80))
    path = _write(inner, make_model())
    check_onnx_safe(path, root=folder, allowed=frozenset({"inside/weights.bin"}))
    with pytest.raises(BundleError, match="not among the bundle's listed files"):
        check_onnx_safe(path, root=folder, allowed=frozenset({"weights.bin"}))
    link = folder.parent / "by-link"
    link.symlink_to(folder)
    check_onnx_safe(link / "inside" / "model.onnx", root=link, allowed=frozenset({"inside/weights.bin"}))


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_pass_or_are_refused(folder: Path, data: st.DataObject) -> None:
    """Bytes of a sound model changed anywhere: accepted or refused, never another exception."""
    model = make_model()
    for place in PLACES:
        place(model, external_tensor(place.__name__, "weights.bin"))
    content = bytearray(model.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    path = folder / "model.onnx"
    path.write_bytes(content)
    try:
        check_onnx_safe(path)
    except BundleError as error:
        assert str(error).isprintable()
