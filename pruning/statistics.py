"""Everything the criteria, the repair and the agent want to know of a network, in one pass over the data.

Per channel group: APoZ, mean activation, Taylor 2017 and 2019, weight norms. Per layer that reads channels: the
mean and second moment (Gram matrix) of its input. Memory: one batch of activations, and the Gram matrices (`moments`).
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import UserError
from .groups import ActivationSite, ChannelGroup
from .layers import FloatArray, output_dim
from .moments import POSITIONS, ConsumerStatistics, MomentSums, feature_count
from .tracing import ActivationMode, evaluation_mode, hooked


@dataclass(frozen=True, eq=False)
class GroupStatistics:
    """Statistics of one channel group; every array is (width,) float64.

    Attributes:
        apoz: Average percentage of zeros in [0, 1], high = weak (Hu et al. 2016): Σ_n Σ_m 1[z_nm = 0] / (N · M) over
            N examples and M positions; the mean over the places where a ReLU shows the channels. None where no ReLU
            follows.
        mean_activation: Σ_n Σ_m z_nm / (N · M), the mean over places and over the runs of a layer that runs often.
        taylor_2017: Σ_n |Σ_m g_nm z_nm / M| / N with g_nm = ∂loss_n / ∂z_nm (Molchanov et al. 2017), summed over the
            places that show the channels; not yet normalised by layer. None if measured without gradients.
        taylor_2019: (Σ_n Σ_m ∂L/∂z_nm z_nm)² of the mean loss L of a minibatch, averaged over minibatches by their
            size (Molchanov et al. 2019, a gate), summed likewise. It depends on the batch size: the larger, the less
            the noise of single examples adds. None if measured without gradients.
        l1: Σ |w| over the producers' weights of the channel (Li et al. 2017).
        l2: √(Σ w²) over the same.
    """

    apoz: FloatArray | None
    mean_activation: FloatArray
    taylor_2017: FloatArray | None
    taylor_2019: FloatArray | None
    l1: FloatArray
    l2: FloatArray


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
    positions: int = POSITIONS,
) -> Statistics:
    """Measure a network in evaluation mode over labelled batches, once through.

    Args:
        network: Comes back as it was (modes, `requires_grad`, hooks); gradients of parameters are not computed.
        groups: Its channel groups.
        batches: Pairs of inputs (N, …), which are not changed, and class indices (N,). The loss of the Taylor criteria
            is the cross-entropy.
        gradients: Whether to run the backward pass that Taylor needs.
        grams: Whether to gather the second moments that least squares needs.
        positions: Positions of an example that enter the second moments; all where there are fewer.

    Raises:
        UserError: No batch came; the network's output is no tensor or not finite; or gradients were asked for and
            cannot be had, for inputs that are no floating-point numbers or a network that runs under `no_grad`.
    """
    places = sorted({_place(site) for group in groups for site in group.sites}, key=str)
    rectified = {_place(site) for group in groups for site in group.sites if site.rectified}
    watch = {place: _SiteSums(place[2], place[3], place in rectified, gradients) for place in places}
    by_call = {place[0]: place for place in places if place[0] is not None}
    modules = dict(network.named_modules(remove_duplicate=False))
    readers = {c.module: c for group in groups for c in group.consumers} if grams else {}
    grams_of = {
        name: MomentSums(name, modules[name], feature_count(modules[name], consumer), positions)
        for name, consumer in readers.items()
    }
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
        for sums in watch.values():
            stack.callback(sums.release)
        network.requires_grad_(False)
        stack.enter_context(torch.enable_grad() if gradients else torch.no_grad())
        for inputs, labels in batches:
            inputs = _prepared(inputs, gradients)
            for sums in watch.values():
                sums.examples = len(inputs)
            with ActivationMode(observe):
                logits = network(inputs)
            if not isinstance(logits, Tensor):
                raise UserError(
                    f"the network must return a tensor of logits (N, classes), but it returns a "
                    f"{type(logits).__name__}; wrap it in a module that returns the logits alone"
                )
            if not bool(torch.isfinite(logits).all()):
                raise UserError("the network's outputs must be finite, but some are NaN or infinite")
            if gradients:
                loss = F.cross_entropy(logits, labels, reduction="sum")  # so that each example's gradient is its own
                if not loss.requires_grad:
                    raise _no_gradient("its output")
                loss.backward()
                total_loss += float(loss.detach())
            for sums in watch.values():
                sums.release()
            examples += len(inputs)
    if not examples:
        raise UserError("statistics need at least one batch of data, but none came")
    norms = weight_norms(network, groups)
    return Statistics(
        groups={group.name: _collect(group, watch, norms[group.name], examples, gradients) for group in groups},
        consumers={name: sums.result() for name, sums in grams_of.items()},
        examples=examples,
        loss=total_loss / examples if gradients else float("nan"),
    )


def _prepared(inputs: Tensor, gradients: bool) -> Tensor:
    """Return a copy, as a network may begin in place; with gradients one that is no leaf, which may not be changed."""
    if not gradients:
        return inputs.detach().clone()
    if not inputs.is_floating_point():
        raise UserError(
            f"gradients need inputs of floating-point numbers, but got {inputs.dtype}; "
            "measure with gradients=False, for criteria other than Taylor's"
        )
    return inputs.detach().requires_grad_(True).clone()


def _no_gradient(place: str) -> UserError:
    return UserError(
        f"gradients must flow through the network, but none reaches {place}: a part of it runs under torch.no_grad or "
        "detaches its result; remove that, or measure with gradients=False, for criteria other than Taylor's"
    )


Place = tuple[int | None, str, int, int]


def _place(site: ActivationSite) -> Place:
    return (site.call, site.module if site.call is None else "", site.dim, site.positions)


@dataclass
class _SiteSums:
    """Sums over examples and runs at one observed tensor, per slot of its channel dimension."""

    dim: int
    positions: int  # neighbours along `dim` that make up one slot
    rectified: bool
    gradients: bool
    examples: int = 1  # of the batch
    seen: int = 0  # examples × runs
    zeros: Any = 0.0
    activation: Any = 0.0
    taylor_2017: Any = 0.0
    taylor_2019: Any = 0.0
    handles: list[RemovableHandle] = field(default_factory=list)

    def hook(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.see(output)

    def see(self, output: Tensor) -> None:
        values = self._slots(output.detach())  # -> (N, slots, positions)
        positions = values.shape[2]
        exact = torch.promote_types(values.dtype, torch.float32)
        if self.rectified:  # nothing is negative: the signs count what is not zero, faster than a comparison would
            active = values.sign().sum(2, dtype=exact).double()  # (N, slots), whole numbers
            self.zeros = self.zeros + (1 - active / positions).sum(0)
        self.activation = self.activation + values.sum(2, dtype=exact).double().sum(0) / positions
        self.seen += len(values)
        if self.gradients and not torch.is_grad_enabled():
            raise _no_gradient("an activation of its channel groups")
        if output.requires_grad:
            # a ReLU's output cannot be overwritten before the backward pass, others can: these are kept as they were
            seen = output.detach() if self.rectified else output.detach().clone()

            def receive(gradient: Tensor, seen: Tensor = seen) -> None:
                product = self._slots(gradient * seen).sum(2).double()  # -> (N, slots)
                self.taylor_2017 = self.taylor_2017 + (product / positions).abs().sum(0)
                self.taylor_2019 = self.taylor_2019 + product.sum(0).square() / len(product)

            self.handles.append(output.register_hook(receive))

    def release(self) -> None:
        """Let the batch's activations go: a hook that knows its own tensor would keep it alive for good."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _slots(self, tensor: Tensor) -> Tensor:
        """View as (N, slots, positions); windows that an example is cut into, one behind another, are positions."""
        values = tensor.movedim(self.dim, 1)
        if self.positions > 1:
            values = values.unflatten(1, (-1, self.positions))
        values = values.flatten(2) if values.dim() > 2 else values.unsqueeze(2)
        windows, rest = divmod(len(values), self.examples)
        if windows == 1 or rest:
            return values
        return values.unflatten(0, (self.examples, windows)).transpose(1, 2).flatten(2)


def weight_norms(network: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, tuple[FloatArray, FloatArray]]:
    """Return, by group, the l1 and l2 of `GroupStatistics`, each (width,); no data is needed."""
    tensors = dict(network.named_parameters(remove_duplicate=False))
    result = {}
    for group in groups:
        absolute, square = np.zeros(group.width), np.zeros(group.width)
        names = {f"{producer}.weight" for producer in group.producers}
        consumed = {f"{consumer.module}.weight" for consumer in group.consumers}
        for piece in group.slices:
            layer = network.get_submodule(piece.tensor.rpartition(".")[0])
            inward = piece.tensor in consumed and piece.dim == 1 - output_dim(layer)
            if piece.tensor not in names or inward:
                continue
            weight = tensors[piece.tensor].detach().transpose(0, piece.dim)  # -> (channels, …)
            for sums, value in zip((absolute, square), _row_sums(weight), strict=True):
                np.add.at(sums, piece.channel, value[piece.index])
        result[group.name] = (absolute, np.sqrt(square))
    return result


def _row_sums(weight: Tensor) -> tuple[FloatArray, FloatArray]:
    """Return (rows,) the sums of |w| and of w²; a few rows at a time, which stay in the cache between the passes."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    parts = [part.flatten(1) for part in weight.split(max(1, 2**18 // max(1, weight[0].numel())))]
    absolute = torch.cat([part.abs().sum(1, dtype=exact) for part in parts])
    square = torch.cat([part.square().sum(1, dtype=exact) for part in parts])
    return absolute.double().cpu().numpy(), square.double().cpu().numpy()


def _collect(
    group: ChannelGroup,
    watch: dict[Place, _SiteSums],
    norms: tuple[FloatArray, FloatArray],
    examples: int,
    gradients: bool,
) -> GroupStatistics:
    def gather(attribute: str, per_run: bool) -> FloatArray:
        total = np.zeros(group.width)
        for site in group.sites:
            sums = watch[_place(site)]
            value = getattr(sums, attribute)
            array = value.cpu().numpy() if isinstance(value, Tensor) else np.zeros(site.index.max() + 1)
            np.add.at(total, site.channel, array[site.index] / (max(sums.seen, 1) if per_run else examples))
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
