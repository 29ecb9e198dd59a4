"""Shipping: patches as merged weights, adapters, GGUF files or text, each loaded back and asked."""
