"""What one forward pass reveals: order of layers, activation functions, the norm behind each layer.

Activation functions are seen as *calls* (`nn.ReLU`, `F.relu`, `x.relu_()` alike), numbered in order; each is
traced back along the autograd graph to the layer that feeds it. So a ReLU is found wherever it stands: as a
module used twice, as a function, after batch norm, or after a residual sum.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from .errors import UserError

RECTIFIERS = {torch.relu, torch.relu_, F.relu, F.relu6, F.relu_, Tensor.relu, Tensor.relu_}
CLAMPS: dict[Any, tuple[str, float | None]] = {  # function -> name and default of its lower end
    F.hardtanh: ("min_val", -1.0),
    F.hardtanh_: ("min_val", -1.0),
    F.threshold: ("threshold", None),
    F._threshold: ("threshold", None),  # type: ignore[attr-defined]
    torch.clamp: ("min", None),
    torch.clamp_: ("min", None),
    torch.clamp_min: ("min", None),
    Tensor.clamp: ("min", None),
    Tensor.clamp_: ("min", None),
    Tensor.clamp_min: ("min", None),
    Tensor.clamp_min_: ("min", None),
}
SMOOTH = {F.gelu, F.silu, F.hardswish, F.hardsigmoid, F.elu, F.leaky_relu, F.selu, F.mish, F.softplus, F.celu}
SMOOTH |= {torch.tanh, torch.sigmoid, F.tanh, F.sigmoid, Tensor.tanh, Tensor.sigmoid, F.hardtanh}


PRODUCTS = {torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, Tensor.matmul, Tensor.__matmul__, Tensor.bmm}
PRODUCTS |= {F.scaled_dot_product_attention}


@dataclass(frozen=True)
class ActivationCall:
    """One call of an activation function in a forward pass.

    Attributes:
        ordinal: 0 for the first call of the pass.
        rectified: Whether it is a ReLU (or ReLU6).
        sources: Names of the nearest layers behind its input.
    """

    ordinal: int
    rectified: bool
    sources: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Slots:
    """Which channels one activation call shows, by the classes of labels beside its result.

    Attributes:
        dim: Dimension of the result along which channels lie, never that of the examples; -1 for the last.
        dims: Number of dimensions of the result.
        roots: (size,) class of the channel that each entry along `dim` belongs to.
    """

    dim: int
    dims: int
    roots: NDArray[np.int64]

    @cached_property
    def known(self) -> frozenset[int]:
        """The classes that are shown."""
        return frozenset(np.unique(self.roots).tolist())


@dataclass
class Trace:
    """What a forward pass showed.

    Attributes:
        order: Position of each leaf layer in the order of its first execution.
        calls: Activation calls in order.
        norm_after: Layer -> batch norm that takes its output directly and untouched, where nothing else does and each
            of the two runs once.
        beyond_graph: Whether plain functions multiply activations with each other as matrices (attention), or take
            them apart to six dimensions (windows): a dependency graph's lists of indices multiply at each reshape.
        dims: Leaf layer -> number of dimensions of its output.
        slots: Ordinal of an activation call -> the channels it shows, where they lie along one dimension; filled in
            by whoever follows the channels.
        roots: Layer -> (n,) classes of its output channels, of the same numbering.
        bare: Parameter of no layer that a function uses as weights -> number of channels it makes; likewise.
    """

    order: dict[str, int] = field(default_factory=dict)
    calls: list[ActivationCall] = field(default_factory=list)
    norm_after: dict[str, str] = field(default_factory=dict)
    dims: dict[str, int] = field(default_factory=dict)
    slots: dict[int, Slots] = field(default_factory=dict)
    roots: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    bare: dict[str, int] = field(default_factory=dict)
    beyond_graph: bool = False


class ActivationMode(TorchFunctionMode):
    """Calls `observe(ordinal, rectified, input, output)` at each activation function, in order.

    Args:
        observe: Receives the call's ordinal, whether it is a ReLU, what `before(input)` returned, and the output.
        before: Looks at the input before the call (an in-place function overwrites it).
    """

    def __init__(
        self, observe: Callable[[int, bool, Any, Tensor], None], before: Callable[[Tensor], Any] | None = None
    ) -> None:
        super().__init__()
        self._observe = observe
        self._before = before
        self._ordinal = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass every call on; report those of activation functions."""
        kwargs = kwargs or {}
        rectified = rectifies(func, args, kwargs)
        if not rectified and func not in SMOOTH:
            return func(*args, **kwargs)
        subject = args[0] if args else kwargs["input"]
        seen = self._before(subject) if self._before else None
        result = func(*args, **kwargs)
        self._observe(self._ordinal, rectified, seen, result)
        self._ordinal += 1
        return result


class _ProductMode(TorchFunctionMode):
    """Notes whether two activations are multiplied as matrices, or one has as many dimensions as windows need."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen = self.seen or func in PRODUCTS or (isinstance(result, Tensor) and result.dim() > 5)
        return result


def rectifies(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call is a ReLU: by name, or a clamp whose lower end is exactly zero."""
    if func in RECTIFIERS:
        return True
    if func not in CLAMPS:
        return False
    name, standard = CLAMPS[func]
    low = args[1] if len(args) > 1 else kwargs.get(name, standard)
    if func in (F.threshold, F._threshold):  # type: ignore[attr-defined]
        value = args[2] if len(args) > 2 else kwargs.get("value")
        return bool(low == 0 and value == 0)
    return isinstance(low, (int, float)) and low == 0


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode; each one's own flag comes back on leaving."""
    flags = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training


@contextmanager
def hooked(handles: list[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks on leaving, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def trace_forward(network: nn.Module, example_input: Tensor) -> Trace:
    """Run one forward pass and note layers, activation calls and norms.

    Args:
        network: Parameters must require gradients (the autograd graph is walked); restored modes.
        example_input: What the network takes.

    Raises:
        UserError: The forward pass fails on this input.
    """
    trace = Trace()
    producer_of: dict[Any, str] = {}  # autograd node -> layer whose output it computed; an in-place change makes a node
    fresh: dict[Any, int] = {}  # autograd node of a layer's output with channels in dimension 1 -> its version then
    runs = Counter[str]()

    def after(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                return
            runs[name] += 1
            trace.order.setdefault(name, len(trace.order))
            trace.dims[name] = output.dim()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and inputs:
                node = inputs[0].grad_fn
                if node in fresh and fresh[node] == inputs[0]._version:
                    trace.norm_after[producer_of[node]] = name
            if output.grad_fn is not None and (
                any(True for _ in module.parameters(recurse=False))
                or isinstance(module, nn.modules.batchnorm._NormBase)
            ):
                producer_of[output.grad_fn] = name
                if _channel_dim(module, output) == 1:
                    fresh[output.grad_fn] = output._version

        return hook

    def observe(ordinal: int, rectified: bool, node: Any, output: Tensor) -> None:
        trace.calls.append(ActivationCall(ordinal, rectified, _nearest(node, producer_of)))

    leaves = [(name, module) for name, module in network.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(after(name)) for name, module in leaves]
    with evaluation_mode(network), hooked(handles), torch.enable_grad():
        try:
            products = _ProductMode()
            with ActivationMode(observe, before=lambda subject: subject.grad_fn), products:
                result = network(example_input)
        except Exception as error:
            raise UserError(
                f"the network must accept an input of shape {tuple(example_input.shape)}, "
                f"but its forward pass failed: {type(error).__name__}: {error}"
            ) from error
    trace.beyond_graph = products.seen
    users = _users(result)
    node_of = {name: node for node, name in producer_of.items()}
    trace.norm_after = {
        name: norm
        for name, norm in trace.norm_after.items()
        if runs[name] == runs[norm] == 1 and users.get(node_of.get(name), 0) <= 1
    }
    return trace


def _channel_dim(module: Any, output: Tensor) -> int:
    """Return the dimension of a layer's output that counts its channels: the last, or the one before the positions."""
    spatial = module.weight.dim() - 2 if isinstance(module, nn.modules.conv._ConvNd) else 0
    return output.dim() - 1 - spatial


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a network's output, or in arguments: in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def _users(result: Any) -> Counter[Any]:
    """Count, per autograd node behind a network's output, how many operations take its result."""
    queue = [output.grad_fn for output in tensors_in(result) if output.grad_fn is not None]
    seen, users = set(queue), Counter[Any]()
    while queue:
        for following, _ in queue.pop().next_functions:
            users[following] += 1
            if following is not None and following not in seen:
                seen.add(following)
                queue.append(following)
    return users


def _nearest(node: Any, producer_of: dict[Any, str]) -> tuple[str, ...]:
    """Walk the autograd graph backwards from `node` to the first layer on every path."""
    found: list[str] = []
    queue, seen = [node], {node}
    while queue:
        current = queue.pop(0)
        if current is None:
            continue
        if current in producer_of:
            found.append(producer_of[current])
            continue
        for following, _ in current.next_functions:
            if following not in seen:
                seen.add(following)
                queue.append(following)
    return tuple(dict.fromkeys(found))
