"""The command line: one file a command, loaded when the command runs, so that `--help` needs no torch."""
