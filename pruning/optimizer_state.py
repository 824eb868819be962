"""What an optimizer remembers (momentum, second moments), kept by parameter name and cut like the parameters.

A cut changes the shape of parameters, and an optimizer made anew would begin at rest. Here its memory is sliced
by the same index maps as the weights: the momentum of each entry that stays is what it was.
"""

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import UserError, closest
from .groups import ChannelGroup
from .indexing import select
from .plan import PruningPlan
from .surgery import kept_entries, named_tensors

Entry = Tensor | float | None
"""One thing remembered of a parameter: a tensor of its shape, or a number such as AdamW's count of steps."""


@dataclass(frozen=True, eq=False)
class OptimizerState:
    """What an optimizer remembers of each parameter; detached copies, never changed.

    In memory this is one more copy of the trained parameters for SGD with momentum, two for AdamW.

    Attributes:
        kind: Full name of the optimizer's class.
        entries: Parameter name -> name of the entry -> its value. A parameter with several names (tied weights)
            stands under its first.
    """

    kind: str
    entries: Mapping[str, Mapping[str, Entry]]


def capture(optimizer: Optimizer, network: nn.Module) -> OptimizerState:
    """Copy what an optimizer remembers.

    Args:
        optimizer: Over parameters of `network`, all or some.
        network: Gives the parameters their names.

    Raises:
        UserError: The optimizer holds a parameter that is not the network's, or remembers something that is
            neither a number nor of the parameter's shape (LBFGS, Adafactor).
    """
    name_of = _names(optimizer, network)
    entries = {
        name_of[id(parameter)]: {
            key: _checked(value, parameter, name_of[id(parameter)], key, copied=True) for key, value in held.items()
        }
        for parameter, held in optimizer.state.items()
    }
    return OptimizerState(_kind(optimizer), entries)


def restore(optimizer: Optimizer, network: nn.Module, state: OptimizerState) -> bool:
    """Let an optimizer go on from a state.

    The memory of another kind of optimizer means nothing to this one, so it is left out. Parameters that the
    optimizer does not train are passed over; those that the state does not name begin at rest.

    Args:
        optimizer: Over parameters of `network`; what it remembered of the named parameters is replaced.
        network: The parameters' names are looked up here.
        state: From `capture` or `slice_state`; stays as it is.

    Returns:
        Whether the state was taken, that is, whether it is of the optimizer's kind.

    Raises:
        UserError: A parameter of the state is missing in the network, or has another shape there.
    """
    if state.kind != _kind(optimizer):
        return False
    parameters = dict(network.named_parameters(remove_duplicate=False))
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, held in state.entries.items():
        parameter = _find(parameters, name)
        if id(parameter) in trained:
            values = {key: _checked(value, parameter, name, key, copied=True) for key, value in held.items()}
            optimizer.state[parameter] = values
    return True


def slice_state(
    state: OptimizerState, groups: Sequence[ChannelGroup], plan: PruningPlan, network: nn.Module
) -> OptimizerState:
    """Cut a state as `surgery.apply_plan` cuts the parameters, by the same index maps.

    Args:
        state: Of an optimizer over `network`.
        groups: Of `network`.
        plan: Channels that stay.
        network: Before the cut.

    Returns:
        The state for the cut network. Numbers and what no cut touches are shared with `state`.

    Raises:
        UserError: The plan does not fit the groups, or groups or state do not fit the network.
    """
    tensors = named_tensors(network)
    kept = kept_entries(groups, plan.completed(groups), tensors)
    kept_of = {id(tensors[name]): positions for name, positions in kept.items()}  # by identity: names may be tied
    parameters = dict(network.named_parameters(remove_duplicate=False))
    entries: dict[str, dict[str, Entry]] = {}
    for name, held in state.entries.items():
        parameter = _find(parameters, name)
        positions = kept_of.get(id(parameter), {})
        entries[name] = {}
        for key, value in held.items():
            value = _checked(value, parameter, name, key, copied=False)
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value = select(value, positions)
            entries[name][key] = value
    return OptimizerState(state.kind, entries)


def carry_optimizer(
    optimizer: Optimizer,
    network: nn.Module,
    smaller: nn.Module,
    groups: Sequence[ChannelGroup],
    plan: PruningPlan,
) -> Optimizer:
    """Return an optimizer for the cut network that goes on where the given one stood.

    It is a `copy.deepcopy` of the given one (same class, parameter groups and hyperparameters; hooks and a
    learning-rate scheduler are not taken along) with the cut network's parameters in the place of the old ones.

    Args:
        optimizer: Over parameters of `network`; stays as it is.
        network: Before the cut.
        smaller: What `surgery.apply_plan` made of it, repaired or not.
        groups: Of `network`.
        plan: Channels that stayed.

    Raises:
        UserError: Networks, groups, plan and optimizer do not belong together, or the optimizer remembers
            something that cannot be cut, see `capture`.
    """
    name_of = _names(optimizer, network)
    state = slice_state(capture(optimizer, network), groups, plan, network)
    parameters = dict(smaller.named_parameters(remove_duplicate=False))
    bare = copy.copy(optimizer)
    bare.state = defaultdict(dict)  # or the copy below would hold a second, uncut memory for a moment
    successors = {identity: _find(parameters, name) for identity, name in name_of.items()}
    carried = copy.deepcopy(bare, dict[int, object](successors))
    restore(carried, smaller, state)
    return carried


def _kind(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _names(optimizer: Optimizer, network: nn.Module) -> dict[int, str]:
    """Return the first name of each parameter, by identity; all of the optimizer's must be among them."""
    name_of = {id(parameter): name for name, parameter in network.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in name_of:
                raise UserError(
                    "the optimizer must hold parameters of this network only, but one of shape "
                    f"{tuple(parameter.shape)} is not among them; make the optimizer from network.parameters()"
                )
    return name_of


def _find(parameters: Mapping[str, nn.Parameter], name: str) -> nn.Parameter:
    if name not in parameters:
        raise UserError(
            f"an optimizer state must be of the network's own parameters, but got {name!r}{closest(name, parameters)}"
        )
    return parameters[name]


def _checked(value: object, parameter: Tensor, name: str, key: str, *, copied: bool) -> Entry:
    """Return an entry, copied if wanted in the parameter's own memory layout; refuse what cannot be cut or placed."""
    if value is None or isinstance(value, (int, float)):
        return value
    if not isinstance(value, Tensor) or (value.shape != parameter.shape and value.numel() != 1):
        came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
        raise UserError(
            f"what an optimizer remembers must be a number or have the parameter's shape {tuple(parameter.shape)}, "
            f"but {key!r} of {name!r} has {came}; use another optimizer (SGD, AdamW), or cut the state with the network"
        )
    if not copied:
        return value
    if value.shape != parameter.shape:
        return value.detach().clone()
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value.detach())
