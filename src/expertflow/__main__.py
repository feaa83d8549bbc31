"""`python -m expertflow`: the same as the command `expertflow`."""

from expertflow.cli.main import main

main()
