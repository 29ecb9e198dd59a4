"""The plain sides of the benchmarks: each algorithm as its paper's code runs it, and tested."""
