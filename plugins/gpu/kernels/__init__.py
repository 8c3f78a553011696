"""The Triton kernels, one per file. Only worker processes (compiler, interpreter) import them."""
