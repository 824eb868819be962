"""Digests of what decides a score, so that a plan that was scored once need not be scored again.

A digest is a SHA-256 in hexadecimal. It depends on values only, never on where they lie in memory or in which process.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .groups import ChannelGroup
from .splits import Split, TensorSplit
from .tracing import evaluation_mode

FORMAT = 2
"""Raised whenever the same inputs would be scored in another way."""

SAMPLE = 64
"""Examples that stand for a split which is too large to be held in memory."""


def digest(*parts: Any) -> str:
    """Return one digest of several values, in order.

    Args:
        parts: What JSON can hold; mappings count as equal whatever the order of their keys.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the digest of named tensors: names, types, shapes and the bytes of the values, in order."""
    total = hashlib.sha256()
    for name, tensor in tensors:
        value = tensor.detach().cpu().contiguous()
        total.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        total.update(value.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def network_digest(network: nn.Module, example: Tensor) -> str:
    """Return the digest of a network: its modules, parameters, buffers, and what it makes of one input.

    The last tells apart networks of the same weights whose own code differs. Only the class and the size of the output
    count, rounded, as the last digits depend on the number of threads.

    Args:
        network: Comes back as it was.
        example: (1, …) one input; a copy is run.
    """
    with evaluation_mode(network), torch.inference_mode():
        output = network(example.clone()).double()  # (1, classes)
    made = [int(output.argmax()), f"{float(output.norm()):.2e}"]
    tensors = (*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False))
    kind = f"{type(network).__module__}.{type(network).__qualname__}"
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(network))  # a function or an object that a module shows lies elsewhere
    return digest(kind, text, made, tensors_digest(tensors))


def groups_digest(groups: Sequence[ChannelGroup]) -> str:
    """Return the digest of channel groups: which entries of which tensors belong to which channel."""
    total = hashlib.sha256()
    for group in groups:
        total.update(json.dumps([group.name, group.width]).encode())
        for piece in group.slices:
            total.update(json.dumps([piece.tensor, piece.dim]).encode())
            for index in (piece.index, piece.channel):
                total.update(np.ascontiguousarray(index, dtype=np.int64).tobytes())
    return total.hexdigest()


def split_digest(split: Split) -> str:
    """Return the digest of images and labels; of a split that is not in memory, of its size and a sample."""
    if not isinstance(split, TensorSplit):
        sample = split.subset(min(SAMPLE, len(split)), torch.Generator().manual_seed(0))
        batches = list(sample.batches(SAMPLE))
        parts = [tensors_digest([("images", batch.images), ("labels", batch.labels)]) for batch in batches]
        return digest(len(split), parts)
    scale = [None if each is None else [float(one) for one in each] for each in (split.mean, split.std)]
    return digest(tensors_digest([("images", split.images), ("labels", split.labels)]), *scale)


def versions() -> tuple[str, str]:
    """Return the versions of PyTorch and of this package."""
    return torch.__version__, version("prunegym")
