"""What a sweep reads, without a language model."""

import torch
from synthetic import sparse_activations


class Store:
    """Synthetic activations as a store."""

    scale, d_in, n_tokens = 1.0, 16, 2048
    manifest = {"key": "k", "hook_name": "blocks.1.hook_resid_pre"}  # noqa: RUF012

    def __init__(self):
        self.mean = torch.zeros(16)

    def tensor(self):
        return sparse_activations()


class Splits:
    train = validation = test = Store()


class Host:
    device, name = torch.device("cpu"), "synthetic"
