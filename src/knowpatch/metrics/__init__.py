"""Metrics: what is measured of an edit. One function each, grouped in files of `kinds/`."""
