"""Batch norm folded into the layer before it: fewer passes over memory where a network is only read.

In evaluation mode a batch norm behind a layer is y = γ/σ (W x + b − μ) + β, one layer with other weights.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from .copying import copy_network
from .precision import LAYOUT_TOLERANCE
from .tracing import evaluation_mode

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
Pair = tuple[str, str]


def foldable(network: nn.Module, example: Tensor) -> tuple[Pair, ...]:
    """Return the names of all layers that a batch norm directly follows, each with its norm; () where in doubt.

    A pair counts where one call of the layer gives the very tensor that the norm's one call gets, and neither is
    parametrised, hooked or of a class of its own. Whether something else reads that tensor is tried: with all pairs
    folded, and statistics that are far from the identity, the outputs have to stay.

    Args:
        network: Comes back as it was.
        example: (1, …) one input; a copy is run.
    """
    pairs = _followers(network, example)
    if not pairs:
        return ()
    tried = copy_network(network)
    _unsettle(tried.get_submodule(norm) for _, norm in pairs)
    with evaluation_mode(tried), torch.inference_mode():
        expected = tried(example.clone())
        got = folded(tried, pairs)(example.clone())
    limit = LAYOUT_TOLERANCE * float(expected.abs().max())
    return pairs if float((expected - got).abs().max()) <= limit else ()  # NaN is no proof either


def folded(network: nn.Module, pairs: Sequence[Pair]) -> nn.Module:
    """Return a copy in evaluation mode that computes the same up to rounding, without the norms of `pairs`.

    Args:
        network: Untouched.
        pairs: From `foldable`, of this network or of one that it was cut from.
    """
    smaller = copy_network(network).eval()
    for layer_name, norm_name in pairs:
        layer: Any = smaller.get_submodule(layer_name)
        norm: Any = smaller.get_submodule(norm_name)
        fuse: Any = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        smaller.set_submodule(layer_name, fuse(layer, norm))
        smaller.set_submodule(norm_name, nn.Identity())
    return smaller


def _followers(network: nn.Module, example: Tensor) -> tuple[Pair, ...]:
    """Return (layer, norm) wherever the norm's input is the layer's output, by one run."""
    names = {module: name for name, module in network.named_modules()}
    plain = [module for module in names if type(module) in LAYERS + NORMS and not _altered(module)]
    outputs: dict[nn.Module, list[Any]] = {}
    inputs: dict[nn.Module, list[Any]] = {}

    def seen(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        outputs.setdefault(module, []).append(output)
        inputs.setdefault(module, []).append(given[0] if len(given) == 1 else None)

    handles = [module.register_forward_hook(seen) for module in plain]
    try:
        with evaluation_mode(network), torch.inference_mode():
            network(example.clone())
    finally:
        for handle in handles:
            handle.remove()
    once = {module for module, given in inputs.items() if len(given) == 1}
    made_by = {id(outputs[module][0]): module for module in once if type(module) in LAYERS}
    found = []
    for norm in sorted((module for module in once if type(module) in NORMS), key=lambda module: names[module]):
        layer = made_by.get(id(inputs[norm][0]))
        if layer is not None and norm.running_var is not None:
            found.append((names[layer], names[norm]))
    return tuple(found)


def _altered(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or nn.utils.parametrize.is_parametrized(module))


def _unsettle(norms: Iterable[Any]) -> None:
    """Give norms statistics and weights of which none is that of the identity, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm in norms:
            for values, low, high in (
                (norm.running_mean, 0.2, 0.6),
                (norm.running_var, 1.5, 2.5),
                *(((norm.weight, 0.7, 1.3), (norm.bias, 0.1, 0.5)) if norm.affine else ()),
            ):
                drawn = torch.rand(values.shape, generator=generator, dtype=torch.float32) * (high - low) + low
                values.copy_(drawn.to(values))
