"""`python -m rsae_triton` is `rsae`; torchrun starts it so: `torchrun --nproc-per-node 8 -m rsae_triton train ...`."""

import signal
import sys


def run() -> int:
    """`rsae` as a process: a Ctrl-C while torch is imported, and a second one, end it without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from rsae_triton.commands.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return status


if __name__ == "__main__":
    sys.exit(run())
