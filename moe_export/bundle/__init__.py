"""Bundles: a folder with ``manifest.json``, models, weights, tokenizer and evidence; written whole or not at
all."""

from __future__ import annotations

from moe_export.bundle.cache import cache_key, find_unchanged
from moe_export.bundle.evidence import save_evidence
from moe_export.bundle.onnx_safety import check_onnx_safe
from moe_export.bundle.reader import Bundle, open_bundle
from moe_export.bundle.tools import tool_versions
from moe_export.bundle.writer import BundleWriter
from moe_export.files import sha256_file

__all__ = [
    "Bundle",
    "BundleWriter",
    "cache_key",
    "check_onnx_safe",
    "find_unchanged",
    "open_bundle",
    "save_evidence",
    "sha256_file",
    "tool_versions",
]
