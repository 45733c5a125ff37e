"""Stage 2: the training loop, the recipes (what is minimised), settings, checkpoints, memory and processes."""
