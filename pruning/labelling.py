"""Book-keeping of a labelled forward pass: labels beside tensors, and what they tie to stored tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .labels import Labels, compact, varies

LABELS = "_prunegym_labels"  # attribute of a tensor; dies with it
PARAMETER_LIMIT = 1_000_000  # entries of a parameter outside layers that are followed one by one


@dataclass
class Claim:
    """Labels of a tensor along one dimension, and the names it goes by."""

    labels: Tensor
    names: dict[str, None] = field(default_factory=dict)


@dataclass
class Following:
    """What one labelled forward pass showed.

    Attributes:
        labels: Classes of labels.
        claims: (id of tensor, dimension) -> labels along it.
        outputs: Layer -> (n,) labels of its output channels.
        inputs: Convolution (not grouped) or linear layer -> (n,) labels of its input features.
        counts: (module, attribute, (n,) labels that the attribute counts).
        through: Grouped convolutions, in order of execution.
        calls: Of each activation call, in order: labels and number of entries by dimension of its result.
        bare: Parameter that a function used as weights, of no layer -> number of channels it makes.
    """

    labels: Labels
    claims: dict[tuple[int, int], Claim] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    through: dict[str, None] = field(default_factory=dict)
    calls: list[tuple[Tensor | None, tuple[int, ...]]] = field(default_factory=list)
    bare: dict[str, int] = field(default_factory=dict)


class Labelling(TorchFunctionMode):
    """Holds a label tensor beside each activation; which module runs; which stored tensors have which labels."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.labels = Labels()
        self.modules = dict(network.named_modules())
        self.found = Following(self.labels)
        self.stack: list[tuple[str, nn.Module]] = []
        self.stored = dict([*network.named_parameters(), *network.named_buffers()])
        self.names = {id(tensor): name for name, tensor in self.stored.items()}
        self.loose: dict[int, tuple[str, Tensor]] = {}  # parameters outside layers: id -> name, labels of entries
        self.fixed: dict[int, str] = {}  # stored tensors that never change size -> why

    def enter(self, name: str, module: nn.Module) -> Callable[..., None]:
        """Return a hook that notes which module runs."""
        return lambda *_: self.stack.append((name, module))

    def leave(self, *_: Any) -> None:
        """Note that the module is done."""
        self.stack.pop()

    def put(self, tensor: Tensor, labels: Tensor) -> None:
        """Set the labels that stand beside a tensor."""
        setattr(tensor, LABELS, labels)

    def get(self, tensor: Tensor) -> Tensor | None:
        """Return compact labels of a tensor, or None for what no channel depends on."""
        labels: Tensor | None = getattr(tensor, LABELS, None)
        if labels is None and id(tensor) in self.names and tensor.numel() > 1:
            name = self.names[id(tensor)]
            if tensor.numel() > PARAMETER_LIMIT:
                labels = self.labels.frozen(tensor.dim(), f"parameter {name!r} is too large to be followed")
            else:
                labels = self.labels.new(tensor.shape)
                self.loose[id(tensor)] = (name, labels)
            self.put(tensor, labels)
        return None if labels is None else compact(self.labels.root_tensor(labels))

    def constant(self, tensor: Tensor) -> Tensor | None:
        """Return labels, frozen for a tensor whose size is fixed in the forward pass; None for single numbers."""
        labels = self.get(tensor)
        if labels is None and tensor.numel() > 1:
            return self.labels.frozen(tensor.dim(), "it meets a tensor of fixed size")
        return labels

    def of(self, tensor: Tensor) -> Tensor:
        """Return labels of a tensor, frozen where no channel depends on it."""
        labels = self.get(tensor)
        return self.labels.frozen(tensor.dim(), "it meets a tensor of fixed size") if labels is None else labels

    def freeze(self, tensors: Sequence[Tensor], reason: str) -> None:
        """Never let the channels of these leave."""
        for tensor in tensors:
            labels = getattr(tensor, LABELS, None)
            if labels is not None:
                self.labels.freeze(labels, reason)
            elif id(tensor) in self.names:
                self.put(tensor, self.labels.frozen(tensor.dim(), reason))
                self.fixed[id(tensor)] = f"{self.names[id(tensor)]!r} is also used outside its layer"

    def claim(self, name: str, tensor: Tensor | None, dim: int, labels: Tensor) -> None:
        """Tie entries of a layer's tensor to channels."""
        if tensor is None:
            return
        if id(tensor) not in self.names:
            self.labels.freeze(labels, f"{name} is computed, not stored (a parametrization or weight norm)")
            return
        claim = self.found.claims.setdefault((id(tensor), dim % tensor.dim()), Claim(labels))
        claim.names[name] = None
        self.labels.unite(claim.labels, labels)

    def close(self) -> None:
        """Say along which dimension each parameter outside layers is cut, and take labels off stored tensors."""
        for identity, (name, labels) in self.loose.items():
            self._place(identity, name, labels)
        for (identity, _), claim in self.found.claims.items():
            if identity in self.fixed:
                self.labels.freeze(claim.labels, self.fixed[identity])
        for tensor in self.stored.values():
            vars(tensor).pop(LABELS, None)

    def _place(self, identity: int, name: str, labels: Tensor) -> None:
        claims = [claim for (other, _), claim in self.found.claims.items() if other == identity]
        for claim in claims:
            self.labels.freeze(claim.labels, f"{name!r} is also used outside its layer")
        settled = compact(self.labels.root_tensor(labels))
        dims = varies(settled)
        if claims:
            self.labels.freeze(settled, f"{name!r} is also used in a layer")
            return
        if len(dims) == 1:
            size = labels.shape[dims[0]]
            self.found.claims[identity, dims[0]] = Claim(settled.reshape(-1).expand(size), {name: None})
        else:
            self.labels.freeze(settled, f"parameter {name!r} does not have its channels along one dimension")
