"""The methods, one file each, in one folder per family of the paper.

A file's stem is the method's name. `DEFAULT` is what the command line takes if none is named.
"""

DEFAULT = "ft"
