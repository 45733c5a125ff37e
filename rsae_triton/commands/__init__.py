"""The command line: one file per command, listed in `cli`. Nothing imports this room."""
