"""Weights: the file formats of models, read and written."""
