"""Random numbers by purpose: the draws of one purpose never shift those of another."""

import hashlib

import numpy as np
import torch


def derive(seed, purpose):
    """A 63-bit integer from a seed and a purpose (a tuple of strings and numbers)."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed, *purpose, device="cpu"):
    """A torch.Generator for one purpose."""
    return torch.Generator(device=device).manual_seed(derive(seed, purpose))


def seed_everything(seed, *purpose):
    """Seed torch's global state, which initialisation and dropout draw from."""
    torch.manual_seed(derive(seed, purpose))


def permutation(seed, purpose, n):
    """A permutation of range(n) from NumPy's legacy generator, whose stream never changes."""
    return np.random.RandomState(derive(seed, (purpose,)) % 2**32).permutation(n)
