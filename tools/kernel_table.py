"""Compiles the GPU kernels for every SM and prints what came out: python tools/kernel_table.py [--sm 80,90a].

No GPU is needed and none is used. Exits with 1 when a kernel spills registers, takes more than 48 KiB of
dynamic shared memory, lacks tensor-core instructions in a matrix product, adds floats by atomic operations,
or differs from its calling convention. The first run compiles (about a second per kernel); later runs read
the cache.
"""

from __future__ import annotations

import argparse
import sys

from moe_export_plugins.gpu.checks import problems
from moe_export_plugins.gpu.compile import compile_kernels
from moe_export_plugins.gpu.contract import DTYPES
from moe_export_plugins.gpu.matrix import HEADERS, requests, table_row
from moe_export_plugins.gpu.sm import find_sm

from moe_export.cli.output import print_json, table
from moe_export.errors import MoeExportError


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 when a kernel has a problem, 2 for wrong use."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sm", default="", help="only these, with commas between: 80,86,89,90a,100a,120a")
    parser.add_argument("--dtype", default="", help=f"only these: {','.join(DTYPES)}")
    parser.add_argument("--few", action="store_true", help="two tiles per matrix product, one of the others")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        sms = tuple(find_sm(s).name for s in options.sm.split(",")) if options.sm else ()
        dtypes = tuple(options.dtype.split(",")) if options.dtype else ()
        kernels = compile_kernels(requests(every_tile=not options.few, sms=sms, dtypes=dtypes))
    except MoeExportError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    rows = [table_row(k) for k in kernels]
    if options.json:
        print_json([dict(zip(HEADERS, row, strict=True)) for row in rows])
    else:
        print(table(HEADERS, rows))
    bad = sum(bool(problems(k)) for k in kernels)
    # Beside the table, so that JSON stays JSON.
    print(f"\n{len(kernels)} kernels compiled, {bad} with problems. Not run on a GPU.", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
