"""`python -m knowpatch`: the command line."""

from knowpatch.cli import main

main()
