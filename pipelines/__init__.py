"""Pipelines: what turns a prompt into a picture with a `ldm.LatentDiffusion`."""
