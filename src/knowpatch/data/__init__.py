"""Datasets: where they come from, what they hold, and one file for each in `sets/`."""
