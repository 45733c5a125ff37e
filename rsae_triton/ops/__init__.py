"""Tensors in, tensors out: the gate's definition, its backends, the training step, what each costs. Knows no SAE."""
