"""Editing intrinsic knowledge: the weights themselves."""
