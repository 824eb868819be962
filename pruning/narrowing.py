"""Make a network narrower for training from scratch: what stays is its shape, and random weights of the right scale."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .errors import UserError, closest
from .grouping import survey_groups
from .plan import PruningPlan
from .surgery import apply_plan

GROUP_WIDTHS = "group_widths"
"""The argument of a network by which `build_network` makes it narrower: group -> channels."""


def check_widths(widths: Any) -> Mapping[str, int]:
    """Return group -> channels; refuse what is none.

    Raises:
        UserError: Not a mapping of texts to whole numbers from 1.
    """
    if not isinstance(widths, Mapping):
        raise UserError(f"widths must map groups to channels, such as {{conv1: 6}}, but got {widths!r:.80}")
    for name, width in widths.items():
        if not isinstance(name, str):
            raise UserError(f"the groups of widths must be names, but got {name!r}; put it in quotes")
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise UserError(f"the width of group {name!r} must be a whole number from 1, but got {width!r:.80}")
    return widths


def narrow(network: nn.Module, widths: Mapping[str, int], input_shape: Sequence[int], *, drawn: bool) -> nn.Module:
    """Return a narrower copy of a network with random weights of the right scale.

    Args:
        network: Of full width; it is left untouched.
        widths: Channels by group; a group that is not named stays whole.
        input_shape: Of one input without the batch.
        drawn: Whether the weights are fresh from the network's constructor. They are cut then, and weights and
            biases of each convolution and linear layer are multiplied by √(fan-in before / fan-in after). For laws
            that scale with 1/√fan-in, as PyTorch's default and so those of the networks built here do, this is what
            the constructor draws for a layer of that width; under any other it keeps the scale of what a layer puts
            out. Otherwise `forget` draws all weights anew, as nothing may be left of trained ones.

    Raises:
        UserError: A group that is unknown or cannot be cut, a width beyond the group's, or a network that cannot be
            run on such an input.
    """
    check_widths(widths)
    first = next(network.parameters(), None)
    example = torch.zeros(1, *input_shape) if first is None else first.new_zeros(1, *input_shape)
    survey = survey_groups(network, example)
    known = {group.name: group.width for group in survey.groups}
    refused = {group.name: group.reason for group in survey.refused}
    for name, width in widths.items():
        if name in refused:
            raise UserError(f"widths may only name groups that can be cut, but got {name!r}: {refused[name]}")
        if name not in known:
            raise UserError(f"widths may only name groups of the network, but got {name!r}{closest(name, known)}")
        if width > known[name]:
            raise UserError(
                f"group {name!r} must keep 1 to {known[name]} channels, but got {width}; "
                "a wider network needs other arguments"
            )
    smaller = apply_plan(network, survey.groups, PruningPlan({name: range(width) for name, width in widths.items()}))
    if drawn:
        _rescale(smaller, network)
    else:
        forget(smaller)
    return smaller


def forget(network: nn.Module) -> None:
    """Draw new weights for every layer, in place, as PyTorch would for a new one.

    Each layer's `reset_parameters` is called, inner layers first, as constructors do; what a network's own constructor
    does to its layers afterwards is not repeated.

    Raises:
        UserError: A layer with parameters of its own has no `reset_parameters`, so that its weights would stay.
    """
    for name, module in _inner_first(network):
        own = next(module.parameters(recurse=False), None)
        reset = getattr(module, "reset_parameters", None)
        if isinstance(module, nn.MultiheadAttention):
            reset = module._reset_parameters
        if own is not None and reset is None:
            raise UserError(
                f"{name or 'the network'} ({type(module).__name__}) has parameters but no reset_parameters; "
                "add one that draws them"
            )
        if reset is not None:
            reset()


def _inner_first(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    seen: set[int] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        for child, inner in module.named_children():
            yield from walk(inner, f"{name}.{child}" if name else child)
        yield name, module

    yield from walk(module, name)


def _rescale(smaller: nn.Module, network: nn.Module) -> None:
    """Give cut weights the scale of their new fan-in, counted as `torch.nn.init` does."""
    whole: dict[str, Any] = dict(network.named_modules())
    done: set[int] = set()
    for name, module in smaller.named_modules():
        if not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) or id(module.weight) in done:
            continue
        done.add(id(module.weight))
        factor = math.sqrt(whole[name].weight[0].numel() / module.weight[0].numel())
        with torch.no_grad():
            for tensor in (module.weight, module.bias):
                if tensor is not None and factor != 1:
                    tensor.mul_(factor)
