"""Training: a run of stages, the loop, losses, checkpoints and averages of the weights."""
