"""The writer of protobuf's text format against protobuf's own reader."""

from __future__ import annotations

from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from moe_export.package.text_format import Enum, Message, quoted, to_text


def parsed(message: Message) -> object:
    return text_format.Parse(to_text(message), model_config_pb2.ModelConfig())


def test_every_kind_of_value() -> None:
    got = parsed(
        [
            ("name", 'a "b" \\ c\n\té'),
            ("max_batch_size", -3),
            (
                "input",
                [("name", "x"), ("data_type", Enum("TYPE_BF16")), ("dims", (-1, 2)), ("optional", True)],
            ),
            ("input", [("name", "y"), ("dims", ()), ("reshape", [])]),
            ("parameters", [("key", "k"), ("value", [("string_value", "")])]),
        ]
    )
    want = model_config_pb2.ModelConfig(
        name='a "b" \\ c\n\té',
        max_batch_size=-3,
        input=[
            model_config_pb2.ModelInput(
                name="x", data_type=model_config_pb2.TYPE_BF16, dims=[-1, 2], optional=True
            ),
            model_config_pb2.ModelInput(name="y", reshape=model_config_pb2.ModelTensorReshape()),
        ],
    )
    want.parameters["k"].string_value = ""
    assert got == want
    assert got.input[1].HasField("reshape")  # type: ignore[attr-defined]  # generated class


def test_a_changed_value_is_another_message() -> None:
    assert parsed([("max_batch_size", 1)]) != parsed([("max_batch_size", 2)])


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair is no text
        return
    assert text_format.Parse(f"name: {quoted(text)}", model_config_pb2.ModelConfig()).name == text
