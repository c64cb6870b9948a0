"""What changes a network's speed or place alone: fused layers, kernels, graphs, precomputing, offload, 8-bit types."""
