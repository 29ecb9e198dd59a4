"""The kinds of wrap, one file each."""
