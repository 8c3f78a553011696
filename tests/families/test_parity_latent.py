"""Parity of every latent family with transformers (one file per group, so that workers share them)."""

from __future__ import annotations

import pytest

from moe_export.models.families.latent import LATENT
from tests.helpers.families import check_family, classes


@pytest.mark.slow
@pytest.mark.parametrize(("name", "model_class"), classes(LATENT))
def test_parity(name: str, model_class: str) -> None:
    check_family(name, model_class)
