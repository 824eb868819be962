"""Labels of channels: integers that say which entries of which tensors can only leave a network together.

A label tensor stands beside each activation and holds, for every entry, the channel it belongs to. Along dimensions in
which all entries belong to the same channel its size is 1 (it is *compact*), so that it stays small.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .groups import IndexArray


class Labels:
    """Classes of labels (union-find): labels of one class leave together; a frozen class never leaves."""

    def __init__(self) -> None:
        self._parent = np.arange(1024)  # grows by doubling; a label that was not given out is its own parent
        self._given = 0
        self._reasons: dict[int, str] = {}  # root of a frozen class -> why

    def new(self, shape: Sequence[int]) -> Tensor:
        """Return distinct fresh labels of a shape."""
        first, count = self._given, int(np.prod(shape))
        self._given += count
        if self._given > len(self._parent):
            more = np.arange(len(self._parent), 2 * self._given)
            self._parent = np.concatenate([self._parent, more])
        return torch.arange(first, first + count).view(tuple(shape))

    def frozen(self, dims: int, reason: str) -> Tensor:
        """Return a fresh label that never leaves, with `dims` dimensions of size 1."""
        label = self.new([1] * dims)
        self.freeze(label, reason)
        return label

    def roots(self, labels: Tensor | IndexArray) -> IndexArray:
        """Return the class of each label, as an array of the same shape."""
        found = np.asarray(labels)
        while True:
            above = self._parent[found]
            if np.array_equal(above, found):
                return found
            found = above

    def root_tensor(self, labels: Tensor) -> Tensor:
        """Return the class of each label."""
        return torch.from_numpy(np.ascontiguousarray(self.roots(labels)).reshape(tuple(labels.shape)))

    def freeze(self, labels: Tensor | IndexArray, reason: str) -> None:
        """Never let these leave; the first reason of a class is the one that is told."""
        for root in np.unique(self.roots(labels)).tolist():
            self._reasons.setdefault(root, reason)

    def reason(self, root: int) -> str | None:
        """Return why a class is frozen, or None."""
        return self._reasons.get(root)

    def unite(self, one: Tensor, other: Tensor) -> None:
        """Let `one` and `other`, of shapes that broadcast, leave together entry by entry."""
        first, second = np.broadcast_arrays(self.roots(one), self.roots(other))
        pairs = np.unique(np.stack([first.ravel(), second.ravel()], 1), axis=0)
        for left, right in pairs[pairs[:, 0] != pairs[:, 1]].tolist():
            self._join(left, right)

    def _join(self, one: int, other: int) -> None:
        low, high = sorted((self._root(one), self._root(other)))
        if low == high:
            return
        self._parent[high] = low
        reason = self._reasons.pop(high, None)
        if reason is not None:
            self._reasons.setdefault(low, reason)

    def _root(self, label: int) -> int:
        root = label
        while self._parent[root] != root:
            root = int(self._parent[root])
        self._parent[label] = root
        return root

    def settle(self, labels: Tensor, prefer: int | None = None) -> Tensor:
        """Let labels vary along one dimension only, so that whatever leaves, a rectangular tensor is left.

        Args:
            labels: Label tensor.
            prefer: The dimension along which entries shall leave one by one; the last that varies by default.

        Returns:
            Compact labels that vary along at most one dimension.
        """
        labels = compact(self.root_tensor(labels))
        varying = varies(labels)
        if len(varying) > 1:
            keep = prefer if prefer in varying else varying[-1]
            first = labels
            for dim in varying:
                first = first if dim == keep else first.narrow(dim, 0, 1)
            self.unite(labels, first)
            labels = compact(self.root_tensor(first))
        return labels


def compact(labels: Tensor) -> Tensor:
    """Shrink to size 1 each dimension along which nothing changes."""
    for dim, size in enumerate(labels.shape):
        if size > 1:
            first = labels.narrow(dim, 0, 1)
            if labels.stride(dim) == 0 or bool((labels == first).all()):
                labels = first
    return labels


def varies(labels: Tensor) -> list[int]:
    """Return the dimensions of compact labels along which they change."""
    return [dim for dim, size in enumerate(labels.shape) if size > 1]


def vector(labels: Tensor, dim: int, size: int) -> Tensor | None:
    """Return compact labels as (size,) labels along `dim`, or None where they change along another dimension."""
    dim %= labels.dim()
    if any(other != dim for other in varies(labels)):
        return None
    return labels.reshape(-1).expand(size)
