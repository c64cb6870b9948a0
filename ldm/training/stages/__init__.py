"""Kinds of training stages, one file for each."""
