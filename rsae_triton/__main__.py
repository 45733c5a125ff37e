"""`python -m rsae_triton` is the same as `rsae`; torchrun uses it: `torchrun --nproc-per-node 8 -m rsae_triton train
...`."""

import signal
import sys


def run() -> int:
    """Runs `rsae` so that Ctrl-C ends it without a traceback, even while torch is imported or when pressed twice."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from rsae_triton.commands.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return status


if __name__ == "__main__":
    sys.exit(run())
