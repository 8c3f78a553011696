"""Headers of weight files: what is broken is refused, as the safetensors library does."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from moe_export.errors import SourceError
from moe_export.importer.checkpoint import (
    inspect_checkpoint,
)
from moe_export.importer.safetensors_header import DTYPE_BITS, read_header
from tests.helpers.checkpoints import (
    Header,
    file_bytes,
    make_model,
    refusal,
)


def _tensor(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is truncated: 0 bytes"),
        (b"\x01\x02", "is truncated: 2 bytes"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n",
            "Git LFS pointer.*git lfs pull",
        ),
        (struct.pack("<Q", 2**63) + b"{}", f"header claims {2**63} bytes"),
        (b"PK\x03\x04" + bytes(1000), "is not a safetensors file, or its header is corrupt"),
        (struct.pack("<Q", 100) + b"{}", "is truncated: its header takes 108 bytes, the file has 10"),
        (file_bytes(b"", b""), "corrupt header: it does not start with"),
        (file_bytes(b" {}", b""), "header is corrupt: it does not start with"),
        (file_bytes(b"{]", b""), "corrupt header: "),
        (file_bytes(b'{"\xff": 1}', b""), "corrupt header: .*utf-8"),
        (file_bytes(b'{"a":' * 50_000, b""), "corrupt header: "),
        (file_bytes(b'{"a": {}, "a": {}}', b""), "'a' is given twice"),
        (file_bytes({"__metadata__": {"a": 1}}, b""), "__metadata__ is not a table of texts"),
        (file_bytes({"__metadata__": []}, b""), "__metadata__ is not a table of texts"),
        (file_bytes({"a": 1}, b""), "tensor 'a': expected dtype, shape and data_offsets"),
        (file_bytes({"a": _tensor(0, 4, dtype="F33")}, bytes(4)), "unknown dtype 'F33'; known: BF16"),
        (file_bytes({"a": _tensor(0, 4, [-1])}, bytes(4)), "shape .* is not a list of sizes"),
        (file_bytes({"a": {**_tensor(0, 4), "shape": [True]}}, bytes(4)), "is not a list of sizes"),
        (file_bytes({"a": {**_tensor(0, 4), "data_offsets": [0]}}, bytes(4)), "are not two numbers"),
        (file_bytes({"a": {**_tensor(0, 4), "data_offsets": [4, 0]}}, bytes(4)), "are out of order"),
        (file_bytes({"a": {**_tensor(0, 4), "data_offsets": [-4, 0]}}, bytes(4)), "are out of order"),
        (file_bytes({"a": _tensor(0, 4, [2])}, bytes(4)), r"4 bytes do not hold F32 of shape \[2\]"),
        (file_bytes({"a": _tensor(0, 1, [1], "F4")}, bytes(1)), "1 bytes do not hold F4"),
        (file_bytes({"a": _tensor(0, 4, [2**40, 2**40])}, bytes(4)), "do not hold"),
        (file_bytes({"a": _tensor(0, 8)}, bytes(4)), r"truncated: tensor 'a' ends at byte \d+, the file has"),
        (file_bytes({"a": _tensor(4, 8)}, bytes(8)), "tensor 'a' leaves a gap after 'the header'"),
        (file_bytes({"a": _tensor(0, 4), "b": _tensor(8, 12)}, bytes(12)), "'b' leaves a gap after 'a'"),
        (file_bytes({"a": _tensor(0, 8), "b": _tensor(4, 12)}, bytes(12)), "'b' overlaps 'a'"),
        (file_bytes({"a": _tensor(0, 4), "b": _tensor(0, 4)}, bytes(4)), "'b' overlaps 'a'"),
        (file_bytes({"a": _tensor(0, 4)}, bytes(7)), "3 bytes after its last tensor belong to none"),
        (file_bytes({}, b""), "holds no tensor"),
    ],
)
def test_broken_weight_file(tmp_path: Path, content: bytes, message: str) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        inspect_checkpoint(folder)


def test_truncated_shard_at_every_length(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert "truncated" in refusal(lambda: inspect_checkpoint(folder))
    path.write_bytes(content)
    inspect_checkpoint(folder)


def test_unreadable_weight_file(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    assert "model.safetensors is not a file" in refusal(lambda: inspect_checkpoint(folder))
    with pytest.raises(SourceError, match="cannot be read"):
        read_header(folder / "model.safetensors")


def test_every_dtype_of_safetensors_is_known(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(file_bytes({"a": _tensor(0, 4, dtype="NOPE")}, bytes(4)))
    with pytest.raises(SafetensorError) as caught, safe_open(path, "np"):
        pass
    known = {text for text in str(caught.value).split("expected one of")[1].split("`")[1::2]}
    assert known == set(DTYPE_BITS)


def their_view(path: Path) -> dict[str, tuple[str, list[int]]] | None:
    """What the safetensors library makes of a file; None = refused."""
    try:
        with safe_open(path, "np") as opened:
            names = opened.keys()
            slices = {name: opened.get_slice(name) for name in names}
            return {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()}
    except SafetensorError:
        return None


SIZES = st.integers(-1, 3) | st.sampled_from([2**62, 2**64])
FUZZED = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(DTYPE_BITS)) | st.just("F33"),
        "shape": st.lists(SIZES, max_size=3),
        "data_offsets": st.tuples(SIZES, st.integers(-1, 16)).map(list),
    }
)


@st.composite
def near_sound(draw: st.DrawFn) -> tuple[Header, bytes]:
    """A sound header with at most one thing changed."""
    header: Header = {}
    end = 0
    tensors: list[str] = draw(st.lists(st.sampled_from("abcd"), unique=True, max_size=4))
    for name in tensors:
        dtype = draw(st.sampled_from(sorted(set(DTYPE_BITS) - {"F6_E2M3", "F6_E3M2", "F4"})))
        shape = draw(st.lists(st.integers(0, 3), max_size=2))
        size = int(np.prod(shape)) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    length = end
    changed: bool = draw(st.booleans())
    if header and changed:
        entry: dict[str, Any] = header[draw(st.sampled_from(sorted(header)))]
        change = draw(st.sampled_from(["dtype", "shape", "data_offsets", "length"]))
        if change == "length":
            length = max(0, end + draw(st.integers(-4, 4)))
        else:
            fuzzed: dict[str, Any] = draw(FUZZED)
            entry[change] = fuzzed[change]
    return header, bytes(length)


@given(
    case=near_sound()
    | st.tuples(st.dictionaries(st.text(max_size=2), FUZZED, max_size=3), st.binary(max_size=20))
)
@example(case=({"a": {"dtype": "BF16", "shape": [1 << 62, 1 << 62, 0], "data_offsets": [0, 0]}}, b""))
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_headers_are_judged_as_the_safetensors_library_does(
    tmp_path: Path, case: tuple[Header, bytes]
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_bytes(*case))
    theirs = their_view(path)
    try:
        ours = {name: (entry.dtype, list(entry.shape)) for name, entry in read_header(path).items()}
    except SourceError:
        assert theirs is None, theirs
    else:
        assert ours == theirs


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_a_model_or_a_source_error(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "m"
    if not folder.exists():
        make_model(folder)
        (tmp_path / "sound").write_bytes((folder / "model.safetensors").read_bytes())
    content = bytearray((tmp_path / "sound").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    (folder / "model.safetensors").write_bytes(content)
    try:
        inspect_checkpoint(folder)
    except SourceError as error:
        assert str(error)
        return
    assert their_view(folder / "model.safetensors") is not None
