"""Sampling: the loop from noise to latents, schedulers, guidance, and noise that depends on the seed alone."""
