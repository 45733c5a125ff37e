"""The command line: one file per command; `cli` lists them. Nothing imports this room."""
