"""How a network is run where no gradient is needed: the format of the numbers and the layout of the images."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from .errors import UserError, closest
from .tracing import evaluation_mode

PRECISIONS = ("float32", "bfloat16")
"""What a `precision` may be: the network's own numbers, or autocast of its convolutions and matrix products."""

LAYOUT_TOLERANCE = 1e-3
"""How far outputs in another layout may lie from the usual ones, relative to the largest output."""


def check_precision(name: str) -> None:
    """Refuse an unknown name."""
    if name not in PRECISIONS:
        raise UserError(f"precision must be a known name, but got {name!r}{closest(name, PRECISIONS)}")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Return the context in which a network runs at a precision; numbers wider than float32 stay as they are.

    Args:
        precision: Name from `PRECISIONS`.
        device: Where the network is.
    """
    check_precision(precision)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def takes_channels_last(network: nn.Module, example: Tensor) -> bool:
    """Return whether a network computes the same when its images lie channels last.

    A network that calls `view` on a map, for one, refuses that layout.

    Args:
        network: Comes back as it was.
        example: (1, …) one input; only (1, C, H, W) has that layout.
    """
    if example.dim() != 4:
        return False
    with evaluation_mode(network), torch.inference_mode():
        expected = network(example.clone())
        try:
            got = network(example.clone(memory_format=torch.channels_last))
        except Exception:  # a network's own code may refuse in its own way
            return False
    if expected.shape != got.shape:
        return False
    limit = LAYOUT_TOLERANCE * float(expected.abs().max())
    return float((expected - got).abs().max()) <= limit
