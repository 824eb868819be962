"""Everything the criteria, the repair and the agent want to know of a network, in one pass over the data.

Per channel group: APoZ, mean activation, Taylor 2017 and 2019, weight norms. Per layer that reads channels: the
mean and second moment (Gram matrix) of its input. Memory: one batch of activations, plus F x F float64 numbers
per reading layer with F Gram features (see `ConsumerStatistics`), F <= `GRAM_LIMIT` for flattened inputs.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from .errors import UserError
from .groups import ActivationSite, ChannelGroup, Consumer
from .tracing import ActivationMode, evaluation_mode, hooked

FloatArray = NDArray[np.float64]

GRAM_LIMIT = 4096
"""Most input features for which a linear layer behind a flatten gets a Gram over channel × position."""


@dataclass(frozen=True, eq=False)
class GroupStatistics:
    """Statistics of one channel group; every array is (width,) float64.

    Attributes:
        apoz: Average percentage of zeros in [0, 1], high = weak (Hu et al. 2016, equation 1); the mean over the
            places where a ReLU shows the channels. None where no ReLU follows.
        mean_activation: Mean over examples and positions.
        taylor_2017: Mean over examples of |mean over positions of gradient × activation| (Molchanov et al. 2017,
            equation 8), summed over the places that show the channels; not yet normalised by layer. None if
            measured without gradients.
        taylor_2019: Mean over examples of (sum over positions of gradient × activation)² (Molchanov et al. 2019,
            gate form), summed likewise. None if measured without gradients.
        l1: Sum of |weights| over the producers of the channel.
        l2: Euclidean norm over the producers' weights of the channel.
    """

    apoz: FloatArray | None
    mean_activation: FloatArray
    taylor_2017: FloatArray | None
    taylor_2019: FloatArray | None
    l1: FloatArray
    l2: FloatArray


@dataclass(frozen=True, eq=False)
class ConsumerStatistics:
    """First and second moment of the input of one layer that reads channels.

    A *feature* is an input channel of a convolution (all positions and kernel taps share it), an input feature of
    a linear layer, or, behind a flatten of more than `GRAM_LIMIT` features, a channel shared by its positions.

    Attributes:
        mean: (F,) E[x].
        second_moment: (F, F) E[x xᵀ], not centred.
        rows: Number of examples × positions seen.
    """

    mean: FloatArray
    second_moment: FloatArray
    rows: int

    @cached_property
    def covariance(self) -> FloatArray:
        """(F, F) E[x xᵀ] − E[x] E[x]ᵀ."""
        return self.second_moment - np.outer(self.mean, self.mean)


@dataclass(frozen=True, eq=False)
class Statistics:
    """What `measure` returns.

    Attributes:
        groups: By group name.
        consumers: By layer name.
        examples: Number of examples seen.
        loss: Mean loss over them, or nan where no gradients were asked for.
    """

    groups: dict[str, GroupStatistics]
    consumers: dict[str, ConsumerStatistics]
    examples: int
    loss: float


def measure(
    network: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    gradients: bool = True,
    grams: bool = True,
) -> Statistics:
    """Measure a network in evaluation mode over labelled batches, once through.

    Args:
        network: Comes back as it was (modes, `requires_grad`, hooks); gradients of parameters are not computed.
        groups: Its channel groups.
        batches: Pairs of inputs (N, …) and class indices (N,). The loss of the Taylor criteria is the cross-entropy.
        gradients: Whether to run the backward pass that Taylor needs.
        grams: Whether to gather the second moments that least squares needs.

    Raises:
        UserError: No batch came, or the network's output is not finite.
    """
    places = sorted({_place(site) for group in groups for site in group.sites}, key=str)
    watch = {place: _SiteSums(place[2]) for place in places}
    by_call = {place[0]: place for place in places if place[0] is not None}
    consumers = {c.module: _shared_features(network, c) for group in groups for c in group.consumers}
    modules = dict(network.named_modules(remove_duplicate=False))
    grams_of = {name: _GramSums(modules[name], positions) for name, positions in consumers.items()} if grams else {}
    handles = [modules[name].register_forward_pre_hook(sums.hook) for name, sums in grams_of.items()]
    for place in places:
        if place[0] is None:
            handles.append(modules[place[1]].register_forward_hook(watch[place].hook))
    required = {parameter: parameter.requires_grad for parameter in network.parameters()}
    examples, total_loss = 0, 0.0

    def observe(ordinal: int, rectified: bool, seen: Any, output: Tensor) -> None:
        if ordinal in by_call:
            watch[by_call[ordinal]].see(output)

    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(network))
        stack.enter_context(hooked(handles))
        stack.callback(lambda: [parameter.requires_grad_(flag) for parameter, flag in required.items()])
        network.requires_grad_(False)
        stack.enter_context(torch.enable_grad() if gradients else torch.no_grad())
        for inputs, labels in batches:
            if gradients:
                inputs = inputs.detach().requires_grad_(True)
            with ActivationMode(observe):
                logits = network(inputs)
            if not bool(torch.isfinite(logits).all()):
                raise UserError("the network's outputs must be finite, but some are NaN or infinite")
            if gradients:
                loss = F.cross_entropy(logits, labels, reduction="sum")  # so that each example's gradient is its own
                loss.backward()
                total_loss += float(loss.detach())
            for sums in watch.values():
                sums.finish()
            examples += len(inputs)
    if not examples:
        raise UserError("statistics need at least one batch of data, but none came")
    norms = _weight_norms(network, groups)
    return Statistics(
        groups={group.name: _collect(group, watch, norms[group.name], examples, gradients) for group in groups},
        consumers={name: sums.result() for name, sums in grams_of.items()},
        examples=examples,
        loss=total_loss / examples if gradients else float("nan"),
    )


Place = tuple[int | None, str, int]


def _place(site: ActivationSite) -> Place:
    return (site.call, site.module if site.call is None else "", site.dim)


@dataclass
class _SiteSums:
    """Sums over examples at one observed tensor, per slot of its channel dimension."""

    dim: int
    zeros: Any = 0.0
    activation: Any = 0.0
    taylor_2017: Any = 0.0
    taylor_2019: Any = 0.0
    positions: int = 0
    pending: list[Tensor] = field(default_factory=list)

    def hook(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.see(output)

    def see(self, output: Tensor) -> None:
        values = self._slots(output.detach())  # -> (N, slots, positions)
        self.positions = values.shape[2]
        self.zeros = self.zeros + (values == 0).sum((0, 2)).double()
        self.activation = self.activation + values.sum(2).double().sum(0)
        if output.requires_grad:
            version = output._version

            def receive(gradient: Tensor, output: Tensor = output, version: int = version) -> None:
                if output._version != version:
                    raise UserError("an activation is overwritten in place after it was observed; use a copy there")
                self.pending.append(self._slots(gradient * output.detach()).sum(2))  # -> (N, slots)

            output.register_hook(receive)

    def finish(self) -> None:
        """Take in the gradients of the batch that just ran backward."""
        for product in self.pending:
            self.taylor_2017 = self.taylor_2017 + (product / self.positions).abs().double().sum(0)
            self.taylor_2019 = self.taylor_2019 + product.double().square().sum(0)
        self.pending.clear()

    def _slots(self, tensor: Tensor) -> Tensor:
        if self.dim == 1:
            return tensor.flatten(2) if tensor.dim() > 2 else tensor.unsqueeze(2)
        return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1]).transpose(1, 2)


class _GramSums:
    """Sums of x and x xᵀ at the input of one layer."""

    def __init__(self, layer: nn.Module, positions: int) -> None:
        self.layer: Any = layer
        self.positions = positions  # features that share one Gram feature (linear layers only)
        self.mean: Any = 0.0
        self.moment: Any = 0.0
        self.rows = 0

    def hook(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = self._rows(inputs[0].detach())  # -> (examples × positions, features)
        self.rows += len(rows)
        self.mean = self.mean + rows.sum(0, dtype=torch.float64)
        self.moment = self.moment + (rows.T @ rows).double()

    def _rows(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            x = x.reshape(-1, x.shape[-1])
            if self.positions > 1:  # (N, C·P) -> (N, P, C)
                x = x.reshape(len(x), -1, self.positions).transpose(1, 2)
            return x.reshape(-1, x.shape[-1])
        if all(extent == 1 for extent in self.layer.kernel_size) and not self.layer.transposed:
            x = x[
                (slice(None), slice(None), *(slice(None, None, step) for step in self.layer.stride))
            ]  # only positions it reads
        return x.transpose(0, 1).flatten(1).T  # (N, C, …) -> (N·…, C)

    def result(self) -> ConsumerStatistics:
        rows = max(self.rows, 1)
        return ConsumerStatistics((self.mean / rows).cpu().numpy(), (self.moment / rows).cpu().numpy(), self.rows)


def _shared_features(network: nn.Module, consumer: Consumer) -> int:
    """Return how many input features share one Gram feature: 1 unless the Gram would be too large."""
    layer: Any = network.get_submodule(consumer.module)
    return consumer.positions if isinstance(layer, nn.Linear) and layer.in_features > GRAM_LIMIT else 1


def _weight_norms(network: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, tuple[FloatArray, FloatArray]]:
    tensors = dict(network.named_parameters(remove_duplicate=False))
    result = {}
    for group in groups:
        absolute, square = np.zeros(group.width), np.zeros(group.width)
        names = {f"{producer}.weight" for producer in group.producers}
        consumed = {f"{consumer.module}.weight" for consumer in group.consumers}
        for piece in group.slices:
            inward = piece.tensor in consumed and piece.dim == _input_dim(network, piece.tensor)
            if piece.tensor not in names or inward:
                continue
            weight = tensors[piece.tensor].detach().double().transpose(0, piece.dim).flatten(1)  # -> (channels, …)
            np.add.at(absolute, piece.channel, weight.abs().sum(1).cpu().numpy()[piece.index])
            np.add.at(square, piece.channel, weight.square().sum(1).cpu().numpy()[piece.index])
        result[group.name] = (absolute, np.sqrt(square))
    return result


def _input_dim(network: nn.Module, tensor: str) -> int:
    return 0 if getattr(network.get_submodule(tensor.rpartition(".")[0]), "transposed", False) else 1


def _collect(
    group: ChannelGroup,
    watch: dict[Place, _SiteSums],
    norms: tuple[FloatArray, FloatArray],
    examples: int,
    gradients: bool,
) -> GroupStatistics:
    def gather(attribute: str, per_position: bool) -> FloatArray:
        total = np.zeros(group.width)
        for site in group.sites:
            sums = watch[_place(site)]
            value = getattr(sums, attribute)
            array = value.cpu().numpy() if isinstance(value, Tensor) else np.zeros(site.index.max() + 1)
            np.add.at(total, site.channel, array[site.index] / (examples * (sums.positions if per_position else 1)))
        return total

    shown = np.zeros(group.width)
    for site in group.sites:
        np.add.at(shown, site.channel, 1.0)
    shown = np.maximum(shown, 1.0)
    return GroupStatistics(
        apoz=gather("zeros", True) / shown if group.rectified else None,
        mean_activation=gather("activation", True) / shown,
        taylor_2017=gather("taylor_2017", False) if gradients else None,
        taylor_2019=gather("taylor_2019", False) if gradients else None,
        l1=norms[0],
        l2=norms[1],
    )
