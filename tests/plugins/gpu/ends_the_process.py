"""Ends the process that imports it, as LLVM does on options it does not know."""

import os
import sys

print("LLVM ERROR: it does not know that", file=sys.stderr, flush=True)
os.abort()
