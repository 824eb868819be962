"""Take the entries of a tensor that stay, along several dimensions at once, at the speed of memory."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

CHUNK = 2**18
"""Elements that are gathered at a time: what the second dimension reads again is still in the cache."""


def select(value: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Return the entries `kept` of each dimension; a new tensor where any is named, of the same memory format.

    Args:
        value: Any tensor.
        kept: Dimension -> (n,) int64 positions that stay, ascending.
    """
    layout = memory_format(value)
    if kept.keys() == {0, 1} and value.numel() > CHUNK:
        value = _select_matrix(value, kept[0].to(value.device), kept[1].to(value.device))
    else:
        for dim in sorted(kept, key=lambda dim: len(kept[dim]) / value.shape[dim]):  # the strongest reduction first
            value = value.index_select(dim, kept[dim].to(value.device))
    return value.contiguous(memory_format=layout) if kept else value


def memory_format(value: Tensor) -> torch.memory_format:
    """Return in which order a tensor's entries lie: channels last, or as its dimensions say."""
    for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if value.dim() == dims and not value.is_contiguous() and value.is_contiguous(memory_format=layout):
            return layout
    return torch.contiguous_format


def _select_matrix(value: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Rows and columns in one go: a few rows at a time, their columns in blocks of neighbours that all stay."""
    block = _block(columns, value.shape[1])
    picked = columns[::block] // block
    result = value.new_empty(len(rows), len(columns), *value.shape[2:])
    shaped = result.view(len(rows), len(picked), -1)
    step = max(1, CHUNK // max(1, value[0].numel()))
    for start in range(0, len(rows), step):
        part = value.index_select(0, rows[start : start + step]).reshape(-1, value.shape[1] // block, shaped.shape[2])
        torch.index_select(part, 1, picked, out=shaped[start : start + step])
    return result


def _block(kept: Tensor, size: int) -> int:
    """Return the largest b such that `kept` is made of whole blocks of b neighbours, aligned to b; `size` divides."""
    ends = torch.nonzero(kept[1:] - kept[:-1] != 1).squeeze(1) + 1  # where a run of neighbours ends
    starts = torch.cat([ends.new_zeros(1), ends])
    lengths = torch.diff(starts, append=ends.new_full((1,), len(kept)))
    return math.gcd(size, *kept[starts].unique().tolist(), *lengths.unique().tolist())
