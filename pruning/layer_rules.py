"""Where channels begin and end: what convolutions, linear layers and norms do with labels."""

from typing import Any

from torch import Tensor, nn

from .drafts import CONVOLUTIONS, TRANSPOSED
from .labelling import Labelling
from .labels import varies, vector
from .tracing import tensors_in

BATCH_NORM = nn.modules.batchnorm._BatchNorm
NORMS: dict[str, tuple[type[nn.Module], int, str]] = {  # call -> module that makes it, channel dimension, its count
    "batch_norm": (BATCH_NORM, 1, "num_features"),
    "instance_norm": (nn.modules.instancenorm._InstanceNorm, 1, "num_features"),
    "group_norm": (nn.GroupNorm, 1, "num_channels"),
    "layer_norm": (nn.LayerNorm, -1, "normalized_shape"),
    "prelu": (nn.PReLU, 1, "num_parameters"),
}


class LayerRules(Labelling):
    """Labels the results of layers, and ties their tensors and counts to channels."""

    def _convolution(self, args: Any, result: Tensor) -> bool:
        subject, weight = args[0], args[1]
        name, module = self.stack[-1]
        if not isinstance(module, CONVOLUTIONS):
            self._note_bare(weight)
            return False
        if subject.dim() != weight.dim():
            return False
        entering = vector(self.of(subject), 1, subject.shape[1])
        if entering is None:
            return False
        transposed, groups = isinstance(module, TRANSPOSED), module.groups
        leaving = self._produce(name, module, weight, 1 if transposed else 0, module.out_channels)
        if groups > 1 and transposed:
            for labels in (entering, leaving):
                self.labels.freeze(labels, f"{name!r} is a grouped transposed convolution")
        elif groups > 1:
            first = entering.view(groups, -1)[:, :1]
            self.labels.unite(entering.view(groups, -1), first)
            self.labels.unite(leaving.view(groups, -1), first)
            self.found.through[name] = None
            self._count(name, groups=first.reshape(-1), in_channels=entering, out_channels=leaving)
        else:
            self._consume(name, weight, 0 if transposed else 1, entering)
            self._count(name, in_channels=entering, out_channels=leaving)
        self.put(result, leaving.view(1, -1, *[1] * (result.dim() - 2)))
        return True

    def _linear(self, args: Any, result: Tensor) -> bool:
        subject, weight = args[0], args[1]
        name, module = self.stack[-1]
        if not isinstance(module, nn.Linear):
            self._note_bare(weight)
            reason = "its layer is not run: a function takes the layer's weight, as attention does"
            self.freeze(list(tensors_in(args)), reason)
            self.put(result, self.labels.frozen(result.dim(), reason))
            return True
        if id(subject) in self.names:
            self.freeze([subject], "it is the input of a layer")
            labels = self.labels.frozen(subject.dim(), "a stored tensor fixes it")
        else:
            labels = self.of(subject)
        leaving = self._produce(name, module, weight, 0, module.out_features)
        if varies(labels) and varies(labels) != [subject.dim() - 1]:  # it mixes positions, each channel by itself
            self.labels.freeze(leaving, "its channels lie on a dimension that the layer does not read")
            self.put(result, labels)
            return True
        entering = labels.reshape(-1).expand(module.in_features)
        self._consume(name, weight, 1, entering)
        self._count(name, in_features=entering, out_features=leaving)
        self.put(result, leaving.view(*[1] * (result.dim() - 1), -1))
        return True

    def _note_bare(self, weight: Tensor) -> None:
        """Remember a stored parameter that is used as weights by a function and belongs to no layer of a known kind."""
        name = self.names.get(id(weight), "")
        owner = self.modules.get(name.rpartition(".")[0])
        if isinstance(weight, nn.Parameter) and not isinstance(
            owner, (*CONVOLUTIONS, nn.Linear, nn.MultiheadAttention)
        ):
            self.found.bare[name] = len(weight)

    def _produce(self, name: str, module: Any, weight: Tensor, dim: int, size: int) -> Tensor:
        """Return labels of a layer's outputs, the same ones each time it runs."""
        leaving = self.found.outputs.get(name)
        if leaving is None:
            leaving = self.found.outputs[name] = self.labels.new((size,))
        if not (isinstance(module, TRANSPOSED) and module.groups > 1):
            self.claim(f"{name}.weight", weight, dim, leaving)
        if weight is not module.weight:
            self.labels.freeze(leaving, f"{name}.weight is not what the layer multiplies with")
        self.claim(f"{name}.bias", module.bias, 0, leaving)
        return leaving

    def _consume(self, name: str, weight: Tensor, dim: int, entering: Tensor) -> None:
        self.claim(f"{name}.weight", weight, dim, entering)
        self.found.inputs.setdefault(name, entering)

    def _count(self, name: str, **attributes: Tensor) -> None:
        for attribute, labels in attributes.items():
            self.labels.unite(self.found.counts.setdefault((name, attribute), labels), labels)

    def _norm(self, kind: str, args: Any, result: Tensor) -> bool:
        subject = args[0]
        labels = self.of(subject)
        name, module = self.stack[-1]
        types, dim, attribute = NORMS[kind]
        if not isinstance(module, types) or any(id(tensor) not in self.names for tensor in tensors_in(args[1:])):
            return False
        owner: Any = module
        self.put(result, labels)
        if kind == "prelu" and owner.num_parameters == 1:
            return True
        size = subject.shape[dim]
        along = vector(labels, dim, size)
        if kind == "layer_norm":
            over = set(range(subject.dim() - len(owner.normalized_shape), subject.dim()))
            if not over & set(varies(labels)) and varies(labels):  # over positions, each channel by itself
                fixed = self.labels.frozen(1, f"layer norm {name!r} runs over positions").expand(size)
                self._claim_all(name, owner, fixed)
                return True
            if owner.weight is None or len(over) > 1:
                reason = f"layer norm {name!r} has no weights, or normalises over more than the channels"
                self.labels.freeze(labels, reason)
                return True
        if along is None:
            return False
        if kind == "group_norm":  # a unit is a whole norm group, so that no statistic changes
            groups = along.view(owner.num_groups, -1)
            self.labels.unite(groups, groups[:, :1])
            self._count(name, num_groups=groups[:, 0])
        self._claim_all(name, owner, along)
        self._count(name, **{attribute: along})
        self.found.outputs.setdefault(name, along)
        return True

    def _claim_all(self, name: str, owner: Any, labels: Tensor) -> None:
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(owner, tensor, None)
            if isinstance(value, Tensor) and value.dim() == 1:
                self.claim(f"{name}.{tensor}", value, 0, labels)
