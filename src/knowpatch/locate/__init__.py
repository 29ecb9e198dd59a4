"""Where knowledge sits: tracing, attribution, and what edits do to the weights."""
