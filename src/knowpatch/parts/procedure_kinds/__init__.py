"""The kinds of procedure, one file each."""
