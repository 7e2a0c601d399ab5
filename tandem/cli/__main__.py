"""`python -m tandem.cli`: the command `tandem`."""

from tandem.cli.app import main

main()
