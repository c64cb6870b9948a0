"""Weights: readers and writers of the file formats of models."""
