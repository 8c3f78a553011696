"""One export of a model for many builds of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from moe_export.importer.export import ExportedModel, export_model


@contextmanager
def one_export(exported: ExportedModel) -> Iterator[None]:
    """Inside, builds of the exported model take that export; passes change a copy. Others are exported."""

    def again(loaded: Any, *, dtype: str = "float32", **options: Any) -> ExportedModel:
        if loaded.module is not exported.source.module:
            return export_model(loaded, dtype=dtype, **options)
        return dataclasses.replace(exported, model=exported.model.clone(), source=loaded, dtype=dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_export.importer.export.export_model", again)
        yield
