"""The benchmark: a plan of cells, run into rows, read into a report."""
