"""Stage 2: the training loop, what it minimises, its settings, checkpoints, memory and processes."""
