"""Merging knowledge into the model: parts that answer beside the model's own weights."""
