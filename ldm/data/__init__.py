"""Captioned images on disk to batches for training, and caches of latents and texts."""
