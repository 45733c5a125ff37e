"""Imported first, so that Ctrl-C ends `rsae` without a traceback even during the seconds of importing torch.

It does nothing in any other program that imports the package. `rsae_triton.__main__.run` restores the signal.
"""

import signal
import sys
import threading
from pathlib import Path

_NAME = sys.argv[0] if sys.argv else ""
if (
    (Path(_NAME).stem == "rsae" or (_NAME == "-m" and "rsae_triton" in sys.orig_argv))
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
