"""`python -m rsae_triton` is `rsae`; torchrun starts it so: `torchrun --nproc-per-node 8 -m rsae_triton train ...`."""

import sys

from rsae_triton.commands.cli import main

sys.exit(main())
