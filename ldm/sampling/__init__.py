"""Sampling: from noise to latents by any scheduler, any guidance, and noise that depends on the seed alone."""
