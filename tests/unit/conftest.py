"""Unit tests run tiny tensors: one thread is several times faster than two that share a core."""

import torch

torch.set_num_threads(1)
