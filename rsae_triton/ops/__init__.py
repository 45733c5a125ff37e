"""Operations on tensors: the definition of the gate, its backends, the training step, and what each costs. Knows no
SAE."""
