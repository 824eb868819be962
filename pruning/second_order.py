"""How much the loss grows when a neuron leaves, from its curvature: the classical rivals of pruning without data.

Both take the empirical Fisher matrix F = mean over examples of g gᵀ, g the gradient of one example's cross-entropy at
its true label, in the place of the Hessian, and a trained network, so that the first order vanishes.

- Optimal brain damage (LeCun, Denker & Solla 1990) keeps the diagonal: δL = ½ Σ F_ww w², here summed over all weights
  that leave with the neuron, incoming (with the bias) and outgoing.
- Optimal brain surgeon (Hassibi & Stork 1993) keeps F of one layer's weights and corrects those that stay. Here the
  weights that leave together are the outgoing ones w_j of a neuron, a block: with H = F + λ 1, δL =
  ½ w_jᵀ ([H⁻¹]_jj)⁻¹ w_j, δw = −[H⁻¹]_:j ([H⁻¹]_jj)⁻¹ w_j, and H⁻¹ loses the block the same way.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from .errors import UserError
from .groups import ChannelGroup
from .layers import FloatArray
from .tracing import evaluation_mode, hooked

EXAMPLES_AT_ONCE = 32
"""Examples whose gradients, each of its own, are in memory together."""

COMPACT = 0.8
"""The inverse is copied to what is left of it when this share of its blocks is left."""


def diagonal_fisher(
    network: nn.Module, layer_names: Sequence[str], batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Average the squared gradients of single examples, in evaluation mode.

    Args:
        network: (N, …) -> (N, classes); comes back as it was.
        layer_names: Layers whose own parameters are meant.
        batches: Pairs of inputs (N, …) and class indices (N,).

    Returns:
        parameter name -> float64 of the parameter's shape, >= 0.

    Raises:
        UserError: A layer is unknown, or no example came.
    """
    modules = dict(network.named_modules(remove_duplicate=False))
    for name in layer_names:
        if name not in modules:
            raise UserError(f"layer must be one of the network's, but got {name!r}; see network.named_modules()")
    chosen = {
        f"{layer}.{name}" if layer else name: parameter.detach()
        for layer in layer_names
        for name, parameter in modules[layer].named_parameters(recurse=False)
    }

    def loss(parameters: dict[str, Tensor], example: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(network, parameters, (example[None],)), label[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0), randomness="same")
    sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in chosen.items()}
    examples = 0
    with evaluation_mode(network), torch.no_grad():  # the transform differentiates all the same
        for inputs, labels in batches:
            for part in zip(inputs.split(EXAMPLES_AT_ONCE), labels.split(EXAMPLES_AT_ONCE), strict=True):
                for name, gradient in each(chosen, *part).items():
                    sums[name] += gradient.square().sum(0)
            examples += len(labels)
    if not examples:
        raise UserError("a Fisher matrix needs at least one example, but none came; give batches of a split")
    return {name: value / examples for name, value in sums.items()}


def brain_damage(network: nn.Module, group: ChannelGroup, batches: Iterable[tuple[Tensor, Tensor]]) -> FloatArray:
    """Return (width,) ½ Σ F_ww w² over a channel's incoming and outgoing weights and its bias, low = leaves first.

    Args:
        network: Comes back as it was.
        group: One of its groups.
        batches: Pairs of inputs (N, …) and class indices (N,).
    """
    layers = dict.fromkeys(piece.tensor.rpartition(".")[0] for piece in group.slices)
    fisher = diagonal_fisher(network, list(layers), batches)
    tensors = dict(network.named_parameters(remove_duplicate=False))
    scores = np.zeros(group.width)
    for piece in group.slices:
        if piece.tensor in fisher:
            lost = (fisher[piece.tensor] * tensors[piece.tensor].detach().double().square() / 2).cpu()
            rows = lost.transpose(0, piece.dim).reshape(lost.shape[piece.dim], -1)  # -> (channels, …)
            np.add.at(scores, piece.channel, rows.sum(1).numpy()[piece.index])
    return scores


def outgoing_fisher(network: nn.Module, layer_name: str, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return (P, P) float64 empirical Fisher of a linear layer's weights, P = inputs · outputs, an input's together.

    Args:
        network: (N, …) -> (N, classes); comes back as it was. Only this layer's own gradients are computed.
        layer_name: A linear layer that runs once on (N, inputs).
        batches: Pairs of inputs (N, …) and class indices (N,).

    Raises:
        UserError: The layer is no such layer, or no example came.
    """
    layer = dict(network.named_modules(remove_duplicate=False)).get(layer_name)
    if not isinstance(layer, nn.Linear):
        raise UserError(f"layer must be an nn.Linear of the network, but {layer_name!r} is {type(layer).__name__}")
    size = layer.in_features * layer.out_features
    found = torch.zeros(size, size, dtype=torch.float64, device=layer.weight.device)
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        put_out = output.detach().requires_grad_()
        seen.append((inputs[0].detach(), put_out))
        return put_out

    examples = 0
    with hooked([layer.register_forward_hook(watch)]), evaluation_mode(network):
        for images, labels in batches:
            for part, own in zip(images.split(1024), labels.split(1024), strict=True):
                seen.clear()
                with torch.enable_grad():
                    loss = F.cross_entropy(network(part), own, reduction="sum")
                if len(seen) != 1 or seen[0][0].shape != (len(own), layer.in_features):
                    raise UserError(
                        f"layer {layer_name!r} must run once on (N, {layer.in_features}), but it ran on "
                        f"{[tuple(read.shape) for read, _ in seen]}; choose a layer behind a flatten"
                    )
                read, put_out = seen[0]
                (gradient,) = torch.autograd.grad(loss, put_out)
                rows = (read[:, :, None] * gradient[:, None, :]).flatten(1)  # -> (N, inputs · outputs)
                found += rows.T @ rows
            examples += len(labels)
    if not examples:
        raise UserError("a Fisher matrix needs at least one example, but none came; give batches of a split")
    return found.div_(examples)


@dataclass(frozen=True, eq=False)
class SurgeonStep:
    """One neuron left.

    Attributes:
        neuron: Its index.
        saliency: ½ w_jᵀ ([H⁻¹]_jj)⁻¹ w_j >= 0, what the quadratic model of the loss grows by.
        weight: (inputs, outputs) float64 outgoing weights after the correction, rows of neurons that left zero.
    """

    neuron: int
    saliency: float
    weight: Tensor


def brain_surgeon(weight: Tensor, fisher: Tensor, *, steps: int, damping: float = 1e-3) -> Iterator[SurgeonStep]:
    """Remove the neuron whose outgoing weights are missed least, correct the others', again and again.

    Args:
        weight: (inputs, outputs) outgoing weights, as in `nn.Linear.weight.T`.
        fisher: (P, P) symmetric, P = inputs · outputs, see `outgoing_fisher`; not changed.
        steps: How many leave, in [0, inputs].
        damping: λ over the mean of F's diagonal, > 0.

    Yields:
        One step after another; of equal saliencies the lowest index leaves.

    Raises:
        UserError: Shapes do not fit, or `steps` or `damping` is out of range.
    """
    neurons, outputs = weight.shape
    size = neurons * outputs
    if fisher.shape != (size, size):
        raise UserError(f"fisher must be ({size}, {size}) for weights {neurons} x {outputs}, but it is {fisher.shape}")
    if not 0 <= steps <= neurons:
        raise UserError(f"steps must be in [0, {neurons}], but got {steps=}; it is the number of neurons that leave")
    if not damping > 0:
        raise UserError(f"damping must be above 0, but got {damping=}; the matrix of few examples has no inverse")
    return _surgeon_steps(weight.detach().double().clone(), fisher.double(), steps, damping)


def _surgeon_steps(weight: Tensor, fisher: Tensor, steps: int, damping: float) -> Iterator[SurgeonStep]:
    outputs = weight.shape[1]
    damped = fisher.clone()
    damped.diagonal().add_(damping * (float(fisher.diagonal().mean()) or 1.0))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    del damped
    stored = torch.arange(len(weight), device=weight.device)  # the neuron of each block of the inverse
    present = torch.ones(len(weight), dtype=torch.bool, device=weight.device)  # the blocks that have not left
    for _ in range(steps):
        blocks = inverse.view(len(stored), outputs, len(stored), outputs).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        kept = torch.nonzero(present).squeeze(1)
        rows = weight[stored[kept]]  # -> (present, outputs)
        solved = torch.linalg.solve(blocks[kept], rows[:, :, None]).squeeze(2)
        cost = (rows * solved).sum(1) / 2
        best = int(cost.argmin())
        place = int(kept[best])
        columns = inverse[:, place * outputs : (place + 1) * outputs].clone()  # -> (P, outputs)
        weight.index_add_(0, stored, (columns @ solved[best]).view(-1, outputs), alpha=-1.0)
        neuron = int(stored[place])
        present[place] = False
        weight[stored[~present]] = 0.0
        yield SurgeonStep(neuron, float(cost[best]), weight.clone())
        block = columns[place * outputs : (place + 1) * outputs]
        inverse.addmm_(columns, torch.linalg.solve(block, columns.T), alpha=-1.0)
        if int(present.sum()) <= COMPACT * len(stored):
            kept = torch.nonzero(present).squeeze(1)
            entries = (kept[:, None] * outputs + torch.arange(outputs, device=kept.device)).flatten()
            inverse = inverse[entries][:, entries]
            stored, present = stored[kept], present[kept]
