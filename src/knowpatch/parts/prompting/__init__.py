"""The kinds of prompt rule, one file each."""
