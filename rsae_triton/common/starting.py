"""Imported first: while `rsae` imports torch, for seconds, a Ctrl-C ends it without a traceback.

In any other program that imports the package nothing happens. `rsae_triton.__main__.run` sets the signal back.
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
