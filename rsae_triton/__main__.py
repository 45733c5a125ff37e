"""`python -m rsae_triton ...` is `rsae ...`."""

import sys

from .cli import main

sys.exit(main())
