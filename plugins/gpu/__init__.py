"""GPU kernels of the MoE ops in Triton, and their adapters for TensorRT. Nothing here was run on a GPU."""
