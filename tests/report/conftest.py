"""Parts that several tests of the report use."""

from __future__ import annotations

from typing import Any

import pytest

from moe_export.bundle.reader import Bundle
from tests.bench.samples import make_bench
from tests.report.samples import make_bundle, make_usage


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("report") / "tiny")


@pytest.fixture(scope="session")
def parity(bundle: Bundle) -> dict[str, Any]:
    """A passed verification of the tiny bundle."""
    from moe_export.verify import verify_bundle
    from tests.helpers.tiny_bundle import TinyReference

    return verify_bundle(bundle.path, against=TinyReference(), threads=1).to_dict()


@pytest.fixture(scope="session")
def failed_parity(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A failed one: two experts of layer 1 have each other's weights."""
    from moe_export.verify import verify_bundle
    from tests.helpers.tiny_bundle import TinyReference, make_tiny_bundle

    folder = make_tiny_bundle(tmp_path_factory.mktemp("failed") / "tiny", broken="expert_swapped")
    return verify_bundle(folder, against=TinyReference(), threads=1).to_dict()


@pytest.fixture(scope="session")
def bench() -> dict[str, Any]:
    return make_bench().to_dict()


@pytest.fixture(scope="session")
def usage() -> dict[str, Any]:
    return make_usage()
