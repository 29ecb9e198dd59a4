"""Resorting to external knowledge: the fact is put where the model reads, not where it knows."""
