"""Copy a user's network, or say what in it cannot be copied."""

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .errors import UserError

REMEDIES = {  # class of the hook that computes a tensor before each run -> how it is taken off
    "WeightNorm": "call torch.nn.utils.remove_weight_norm on the layer",
    "SpectralNorm": "call torch.nn.utils.remove_spectral_norm on the layer",
    "BasePruningMethod": "call torch.nn.utils.prune.remove on the layer, which makes its mask part of the weights",
}


def copy_network(network: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a deep copy of a network.

    Args:
        network: Stays as it is.
        memo: By id, what stands in the copy for an object of the network, as for `copy.deepcopy`.

    Raises:
        UserError: Something in the network cannot be copied; a tensor that was computed is named with its module.
    """
    try:
        return copy.deepcopy(network, memo)
    except Exception as error:  # a user's module may hold anything
        problem = next(_computed(network), "")
        if problem:
            raise UserError(f"a network must be copied before it is cut, but {problem}") from error
        raise UserError(
            "a network must be copied before it is cut, but copy.deepcopy fails with "
            f"{type(error).__name__}: {error}; keep what cannot be copied outside the network"
        ) from error


def _computed(network: nn.Module) -> Iterator[str]:
    """Yield what is wrong with each computed tensor that some module holds."""
    for name, module in network.named_modules():
        hooks = [kind.__name__ for hook in module._forward_pre_hooks.values() for kind in type(hook).__mro__]
        remedy = next((REMEDIES[kind] for kind in hooks if kind in REMEDIES), "")
        for attribute, value in vars(module).items():
            if any(tensor.grad_fn is not None for tensor in _held(value)):
                place = f"{name}.{attribute}" if name else attribute
                todo = remedy or "delete the attribute, or store a detached copy"
                yield f"{place!r} holds a tensor that was computed, with its history; {todo}"


def _held(value: Any) -> Iterator[Tensor]:
    """Yield tensors in an attribute, in nested containers, buffers too; modules speak for themselves."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple, set)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _held(item)
