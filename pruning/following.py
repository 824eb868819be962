"""Follow channels through one forward pass, by labels.

Right also where Torch-Pruning's graph has no answer (channel split and shuffle by run-time sizes, attention computed
by plain functions), and a second opinion where it has one. Operations that only move entries (view, permute, chunk,
cat, ...) are run on the labels themselves, so that what they do needs no description. Element-wise operations unite
labels, layers end and begin them, and whatever is not known here freezes them with its name as the reason: too much
can be refused, but nothing cut wrong.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .labelling import Following
from .labels import compact, varies
from .layer_rules import LayerRules
from .operations import (
    ATTENTION,
    CONVOLUTION_CALLS,
    COPIES,
    ELEMENTWISE,
    FRESH,
    MOVES,
    NORM_CALLS,
    PIECES,
    REDUCTIONS,
    SILENT,
    SPATIAL,
)
from .tracing import SMOOTH, evaluation_mode, hooked, rectifies, tensors_in


def follow_channels(network: nn.Module, example_input: Tensor) -> Following:
    """Run one labelled forward pass.

    Args:
        network: A copy that may be run; its parameters and modes stay as they are.
        example_input: What it takes.

    Returns:
        Which channels of which tensors leave together, or never.
    """
    mode = _Follower(network)
    example_input = example_input.detach().clone()
    mode.put(example_input, mode.labels.frozen(example_input.dim(), "its channels are the network's inputs"))
    handles = []
    for name, module in network.named_modules():
        handles.append(module.register_forward_pre_hook(mode.enter(name, module)))
        handles.append(module.register_forward_hook(mode.leave, always_call=True))
    with evaluation_mode(network), hooked(handles), torch.enable_grad(), mode:
        result = network(example_input)
    for output in tensors_in(result):
        mode.freeze([output], "its channels are the network's outputs")
    mode.close()
    return mode.found


class _Follower(LayerRules):
    """Labels the result of every call."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._label(func, args, kwargs, result)
        if rectifies(func, args, kwargs) or func in SMOOTH:
            self.found.calls.append((self.get(result), tuple(result.shape)))
        return result

    def _label(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Put labels beside the results of any call."""
        given, results = list(tensors_in((args, kwargs))), list(tensors_in(result))
        name = getattr(func, "__name__", "an operation")
        if not given or (name in SILENT and not results):
            return
        try:
            known = self._known(func, name, args, kwargs, given, result, results)
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError):
            known = False  # a known function, called in an unusual way
        if not known:
            reason = f"{name.strip('_')} is not an operation whose channels can be followed"
            if name.strip("_") in ATTENTION:
                reason = f"attention ({name.strip('_')}) mixes its channels; it stays whole"
            self.freeze(given, reason)
            if any(self.get(tensor) is not None for tensor in given):
                for tensor in results:
                    self.put(tensor, self.labels.frozen(tensor.dim(), reason))

    def _known(
        self, func: Any, name: str, args: Any, kwargs: Any, given: list[Tensor], result: Any, results: list[Tensor]
    ) -> bool:
        """Label the results of a call; False where the operation is not known."""
        if name in CONVOLUTION_CALLS:
            return self._convolution(args, result)
        if name == "linear":
            return self._linear(args, result)
        if name in NORM_CALLS:
            return self._norm(name, args, result)
        if all(self.get(tensor) is None for tensor in given):
            return True
        if name == "__get__":
            name = "permute"  # a property such as x.T is run on the labels too
        plain = name.strip("_")
        if plain in FRESH:
            return True
        if plain in COPIES:
            self.put(result, self.of(args[0]))
            return True
        if plain in MOVES:
            return self._move(func, plain, args, kwargs, result)
        if name in PIECES:
            return self._pieces(func, name, args, kwargs, results)
        if plain == "glu":
            return self._glu(args, kwargs, result)
        if plain in REDUCTIONS and len(given) == 1:
            return self._reduction(plain, args, kwargs, results)
        if plain in ELEMENTWISE:
            return self._elementwise(given, result)
        if ("pool" in name and "unpool" not in name) or plain in SPATIAL:
            return self._spatial(name, args, kwargs, results)
        return False

    def _glu(self, args: Any, kwargs: Any, result: Tensor) -> bool:
        """One half gates the other: they lose equally many."""
        subject = args[0]
        labels = self.of(subject)
        dim = kwargs.get("dim", args[1] if len(args) > 1 else -1) % subject.dim()
        first, second = labels.expand(subject.shape).chunk(2, dim)
        self.labels.unite(compact(first), compact(second))
        self._settle(result, first)
        return True

    def _move(self, func: Any, name: str, args: Any, kwargs: Any, result: Tensor) -> bool:
        if name in ("channel_shuffle", "native_channel_shuffle"):
            groups = self.of(args[0]).expand(args[0].shape).unflatten(1, (_ints(args[1:] or kwargs["groups"])[0], -1))
            self.labels.unite(compact(groups), compact(groups.narrow(1, 0, 1)))
        if name == "view":
            args = (args[0], _ints(args[1:]))  # labels are not laid out as the tensor is
        full = self._swapped(args), self._swapped(kwargs)
        if name == "roll":
            shown = self.of(args[0])
            dims = kwargs.get("dims", args[2] if len(args) > 2 else None)
            if dims is None or {dim % shown.dim() for dim in _ints(dims)} & set(varies(shown)):
                return False
        labels = (torch.reshape if name == "view" else func)(*full[0], **full[1])
        if labels.shape != result.shape:
            return False
        prefer = 1 if name == "pixel_shuffle" else None
        if name in ("view", "reshape"):
            sizes = _ints(args[1:] or kwargs.get("shape", ()))
            prefer = sizes.index(-1) if -1 in sizes else None
        self._settle(result, labels, prefer, loose=all(id(tensor) in self.names for tensor in tensors_in(args)))
        return True

    def _settle(self, tensor: Tensor, labels: Tensor, prefer: int | None = None, loose: bool = False) -> None:
        """Set labels; those of a lone parameter stay entry by entry until it meets an activation."""
        self.put(tensor, compact(labels) if loose else self.labels.settle(labels, prefer))

    def _swapped(self, value: Any) -> Any:
        """Return arguments with each tensor replaced by its labels, at full size."""
        if isinstance(value, Tensor):
            return self.of(value).expand(value.shape)
        if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            return type(value)(self._swapped(item) for item in value)
        return {key: self._swapped(item) for key, item in value.items()} if isinstance(value, dict) else value

    def _pieces(self, func: Any, name: str, args: Any, kwargs: Any, results: list[Tensor]) -> bool:
        """Split a tensor: pieces of equal size lose equally many; other pieces keep their size and place."""
        subject = args[0]
        labels = self.of(subject)
        if id(subject) in self.names or not varies(labels):
            pass
        elif name == "__getitem__":
            if not self._index(args[1], subject, labels):
                return False
        else:
            position = {"narrow": 1, "select": 1, "unbind": 1}.get(name, 2)
            dim = kwargs.get("dim", args[position] if len(args) > position else 0) % subject.dim()
            if dim in varies(labels):
                sizes = {piece.shape[dim] for piece in results}
                if name in ("narrow", "select", "unbind") or len(sizes) != 1:
                    self.labels.freeze(labels, f"{name} fixes the sizes of its pieces")
                else:
                    pieces = list(labels.expand(subject.shape).split(sizes.pop(), dim))
                    for piece in pieces[1:]:
                        self.labels.unite(compact(pieces[0]), compact(piece))
        moved = func(self._swapped(subject), *args[1:], **kwargs)
        for piece, own in zip(results, [moved] if isinstance(moved, Tensor) else moved, strict=True):
            self._settle(piece, own)
        return True

    def _index(self, index: Any, subject: Tensor, labels: Tensor) -> bool:
        """Tie or freeze what an index such as x[:, :3] takes apart; False where the index is no plain one."""
        index = index if isinstance(index, tuple) else (index,)
        plain = (int, slice, type(None), type(Ellipsis))
        if any(isinstance(item, bool) or not isinstance(item, plain) for item in index):
            return False
        used = sum(item is not None and item is not Ellipsis for item in index)
        dim = 0
        for item in index:
            if item is Ellipsis:
                dim += subject.dim() - used
            elif item is not None:
                if dim in varies(labels) and item != slice(None):
                    self._take(item, dim, subject, labels)
                dim += 1
        return True

    def _take(self, item: Any, dim: int, subject: Tensor, labels: Tensor) -> None:
        size = subject.shape[dim]
        start, stop, step = (item, item + 1, 1) if isinstance(item, int) else item.indices(size)
        halves = ((0, size // 2, 1), (size // 2, size, 1)) if isinstance(item, slice) and size % 2 == 0 else ()
        if (start, stop, step) in halves:  # a size taken at run time; one that is not fails its trial cut
            self.labels.unite(*labels.split(size // 2, dim))
        elif (start, stop, step) != (0, size, 1):
            self.labels.freeze(labels, "a slice fixes the places of its channels")

    def _elementwise(self, given: list[Tensor], result: Tensor) -> bool:
        dims = result.dim()
        whole: Tensor | None = None
        sizes: list[int] = []
        for tensor in given:
            labels = self.constant(tensor)
            if labels is None:
                continue
            other = labels.reshape([1] * (dims - labels.dim()) + list(labels.shape))
            other_sizes = [1] * (dims - tensor.dim()) + list(tensor.shape)
            whole = other if whole is None else self._met(whole, sizes, other, other_sizes)
            sizes = other_sizes if not sizes else [max(pair) for pair in zip(sizes, other_sizes, strict=True)]
        if whole is not None:
            self._settle(result, whole, loose=all(id(tensor) in self.names for tensor in given))
        return True

    def _met(self, one: Tensor, one_sizes: list[int], other: Tensor, other_sizes: list[int]) -> Tensor:
        """Bring two operands together; one number for all channels of the other (broadcast) ties nothing."""
        spread_one = any(one_sizes[dim] == 1 < other_sizes[dim] for dim in varies(other))
        spread_other = any(other_sizes[dim] == 1 < one_sizes[dim] for dim in varies(one))
        if not spread_one and not spread_other:
            self.labels.unite(one, other)
            return one if len(varies(one)) <= len(varies(other)) else other
        small, large = (one, other) if spread_one else (other, one)
        reason = "it is spread over other channels by broadcasting"
        self.labels.freeze(small, reason)
        if (spread_one and spread_other) or set(varies(small)) & set(varies(large)):
            self.labels.freeze(large, reason)
        return large

    def _reduction(self, name: str, args: Any, kwargs: Any, results: list[Tensor]) -> bool:
        subject = args[0]
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if isinstance(dims, bool):
            return False
        labels = self.of(subject)
        reduced = {dim % subject.dim() for dim in (range(subject.dim()) if dims is None else _ints(dims))}
        mixed = bool(reduced & set(varies(labels)))
        if mixed:
            self.labels.freeze(labels, f"{name} runs over its channels")
        for result in results:
            if mixed:
                self.put(result, self.labels.frozen(result.dim(), f"{name} runs over its channels"))
            elif result.dim() == subject.dim():
                self.put(result, labels)
            else:
                self.put(result, labels.reshape([size for dim, size in enumerate(labels.shape) if dim not in reduced]))
        return True

    def _spatial(self, name: str, args: Any, kwargs: Any, results: list[Tensor]) -> bool:
        """Pooling, resizing, padding: each channel by itself, along other dimensions."""
        subject = args[0]
        labels = self.of(subject)
        self.freeze(list(tensors_in((args[1:], kwargs))), f"{name} takes it as an argument")
        for result in results:
            if name == "pad" and result.dim() == subject.dim():
                same = [dim for dim in varies(labels) if result.shape[dim] != subject.shape[dim]]
                if same:
                    pads = _ints(args[1] if len(args) > 1 else kwargs["pad"])
                    mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
                    if min(pads) < 0 or mode != "constant":
                        return False
                    fill = int(self.labels.frozen(0, "padding adds channels of its own"))
                    self._settle(result, F.pad(labels.expand(subject.shape), pads, value=fill))
                    continue
            elif set(varies(labels)) - {0, 1} or result.dim() != subject.dim() or result.shape[:2] != subject.shape[:2]:
                return False
            self.put(result, labels)
        return True


def _ints(value: Any) -> list[int]:
    """Return one integer, several, or a sequence of them, as a list."""
    while isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], (list, tuple)):
        value = value[0]
    return [int(item) for item in value] if isinstance(value, (list, tuple)) else [int(value)]
