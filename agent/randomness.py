"""Seeds of single purposes, and the caller's random state given back."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Give PyTorch's, NumPy's and Python's global random state back on leaving (Stable-Baselines3 seeds all three)."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


def derive_seed(root: int, purpose: str) -> int:
    """Return the seed of one purpose; different purposes never share random numbers."""
    name = purpose.encode()
    name = name.ljust(8, b"\0") if len(name) <= 8 else hashlib.sha256(name).digest()[:8]
    digest = int.from_bytes(name, "little")
    return int(np.random.SeedSequence([root, digest]).generate_state(1)[0] % 2**31)
