"""What changes only a network's speed or place: fused layers, kernels, graphs, precomputing, offload, quantisation."""
