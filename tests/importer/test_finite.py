"""Weights that are NaN or infinite, found when a folder is read through."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_export.errors import SourceError
from moe_export.importer.checkpoint import (
    check_finite,
    hash_of_digests,
    source_hash,
)
from moe_export.importer.read_through import read_through
from moe_export.progress import NullProgress
from tests.helpers.checkpoints import (
    CONFIG,
    DTYPES,
    SECOND,
    file_bytes,
    make_model,
    make_sharded,
    refusal,
    save,
)


@pytest.mark.parametrize(
    "dtype", [name for name in DTYPES if name not in ("F64", "F32", "C64", "I64", "BOOL")]
)
def test_every_bit_pattern_of_small_floats(tmp_path: Path, dtype: str) -> None:
    """All 256 or 65536 patterns, judged by ml_dtypes and NumPy."""
    kind = np.dtype(DTYPES[dtype])
    patterns = np.arange(256**kind.itemsize, dtype=f"u{kind.itemsize}").view(kind)
    with np.errstate(invalid="ignore"):
        wide = patterns.astype(np.float64)
    bad = ~np.isfinite(wide)
    assert bad.any()
    folder = make_model(tmp_path / "m")
    save(folder / "model.safetensors", {"ok": patterns[~bad]})
    check_finite(folder)
    save(folder / "model.safetensors", {"ok": patterns[~bad], "w": patterns.reshape(16, -1)})
    message = refusal(lambda: check_finite(folder))
    counts = [f"{n} {w}" for n, w in ((np.isnan(wide).sum(), "NaN"), (np.isinf(wide).sum(), "infinite")) if n]
    first = [int(i) for i in np.argwhere(bad.reshape(16, -1))[0]]
    assert f"tensor 'w' in {folder / 'model.safetensors'} has {' and '.join(counts)} of its values" in message
    assert f"the first at {first};" in message
    assert "'ok'" not in message


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@given(data=st.data())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bit_patterns(tmp_path: Path, dtype: str, data: st.DataObject) -> None:
    kind = np.dtype(DTYPES[dtype])
    edges = [0, 1, 0x7F80_0000, 0xFF80_0000, 0x7F80_0001, 0x7FC0_0000, 0x7F7F_FFFF, 0x7FF0_0000_0000_0000]
    numbers = st.integers(0, 256**kind.itemsize - 1) | st.sampled_from(edges).map(
        lambda n: n % 256**kind.itemsize
    )
    values = np.array(data.draw(st.lists(numbers, min_size=1, max_size=30)), f"u{kind.itemsize}").view(kind)
    folder = tmp_path / "m"
    if not folder.exists():
        make_model(folder)
    save(folder / "model.safetensors", {"pad": np.zeros(1, np.bool_), "w": values})
    with np.errstate(invalid="ignore"):
        wide = values.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(wide))
    if not bad.size:
        check_finite(folder)
        return
    message = refusal(lambda: check_finite(folder))
    assert f"the first at [{bad[0]}]" in message
    assert (f"{np.isnan(wide).sum()} NaN" in message) == bool(np.isnan(wide).any())
    assert (f"{np.isinf(wide).sum()} infinite" in message) == bool(np.isinf(wide).any())


def test_kinds_of_bad_weights(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    path = folder / "model.safetensors"
    weights = np.zeros((2, 3, 4), np.complex64)
    weights[1, 2, 3] = complex(0, np.inf)
    save(path, {"z": weights})
    assert "1 infinite of its values, the first at [1, 2, 3]" in refusal(lambda: check_finite(folder))
    save(path, {"scalar": np.array(np.nan, np.float32)})
    assert "tensor 'scalar' in" in refusal(lambda: check_finite(folder))
    save(path, {f"w{i}": np.array([0, -np.inf], np.float16) for i in range(5)})
    message = refusal(lambda: check_finite(folder))
    assert all(f"'w{i}'" in message for i in range(3)) and "; and 2 more tensors" in message
    save(path, {"i": np.full(4, -1), "flag": np.ones(2, np.bool_), "empty": np.zeros((0, 3), np.float32)})
    check_finite(folder)


def test_finite_check_is_blockwise(tmp_path: Path) -> None:
    """64 MiB of weights with the fault in the last block: little memory, right coordinate, full progress."""
    folder = make_model(tmp_path / "m")
    path = folder / "model.safetensors"
    shape = [4096, 4096]
    header = file_bytes({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 1 << 26]}}, b"")
    with path.open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + (1 << 26))
    from tests.bundle.test_writer import Recorder

    progress = Recorder()
    tracemalloc.start()
    try:
        check_finite(folder, progress)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 24 << 20
    assert progress.stages == {"check weights": [1 << 26, 1 << 26]}
    with path.open("r+b") as stream:
        stream.seek(len(header) + (1 << 26) - 8)
        stream.write(np.array(np.nan, np.float32).tobytes())
    assert "1 NaN of its values, the first at [4095, 4094]" in refusal(lambda: check_finite(folder))


def test_both_full_reads_at_once(tmp_path: Path) -> None:
    folder = make_sharded(tmp_path / "m")
    assert hash_of_digests(read_through(folder)) == source_hash(folder)
    sizes = {name: size for name, (size, _) in read_through(folder).items()}
    assert sizes[SECOND] == (folder / SECOND).stat().st_size
    save(folder / SECOND, {"b": np.full((3, 1), np.nan, np.float32)})
    with pytest.raises(SourceError, match="tensor 'b'.*3 NaN"):
        read_through(folder)


def test_a_failure_of_one_reader_ends_the_other(tmp_path: Path) -> None:
    folder = make_sharded(tmp_path / "m")
    seen = []

    class Interrupted(NullProgress):
        @contextmanager
        def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
            def step(count: int) -> None:
                seen.append(name)
                raise KeyboardInterrupt

            yield step

    with pytest.raises(KeyboardInterrupt):
        read_through(folder, Interrupted())
    assert seen == ["hash source"]


def test_holes_of_a_sparse_file_are_zeros_and_what_lies_between_is_read(tmp_path: Path) -> None:
    count = 24 << 20  # three blocks of 32 MiB
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    header = json.dumps({"a": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    header += b" " * (-len(header) % 8)
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + 4 * count)
    check_finite(tmp_path)
    with file.open("r+b") as stream:
        stream.seek(8 + len(header) + 4 * (count - 5))
        stream.write(np.float32(np.inf).tobytes())
    with pytest.raises(SourceError, match=rf"1 infinite of its values, the first at \[{count - 5}\]"):
        check_finite(tmp_path)
