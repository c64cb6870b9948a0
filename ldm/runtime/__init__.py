"""Changes of a network's speed or device alone: fused layers, kernels, graphs, precomputing, offload, quantisation."""
