"""A finished bundle in the form that another server wants: one module per format, and a registry of them."""

from __future__ import annotations

from moe_export.package.base import Package, PackageFormat, PackageOptions
from moe_export.package.registry import FORMATS, get_format
from moe_export.package.write import package_bundle

__all__ = ["FORMATS", "Package", "PackageFormat", "PackageOptions", "get_format", "package_bundle"]
