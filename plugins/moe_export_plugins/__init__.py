"""Libraries of moe-export for inference runtimes: ``cpu/libmoe_export_cpu.so`` for ONNX Runtime."""
