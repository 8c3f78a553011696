"""backends/onnxruntime."""
