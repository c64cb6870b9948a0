"""Tasks of a pipeline, one file for each: from a run to latents."""
