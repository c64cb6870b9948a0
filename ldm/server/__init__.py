"""Serving: an engine that makes images of many requests at once, and its HTTP interface."""
