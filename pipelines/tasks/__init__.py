"""Tasks of a pipeline, one file for each: functions that make the latents of a run."""
