"""The metrics, one function each, one file for each group. A file's stem is the group's name."""
