"""`python -m sitkit`."""

from sitkit.cli import main

main()
