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
from .tracing import evaluation_mode, trace_forward

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
Pair = tuple[str, str]


def foldable(network: nn.Module, example: Tensor) -> tuple[Pair, ...]:
    """Return the names of all layers that a batch norm directly follows, each with its norm; () where in doubt.

    A pair counts where each of the two runs once, nothing else takes the layer's output, and neither is parametrised,
    hooked or of a class of its own. It is tried: with all of them folded, and statistics that are far from the
    identity, the outputs have to stay.

    Args:
        network: Comes back as it was.
        example: (1, …) one input; a copy is run.
    """
    tried = copy_network(network).requires_grad_(True)
    modules = dict(tried.named_modules())
    followers = trace_forward(tried, example.clone()).norm_after
    pairs = tuple((name, norm) for name, norm in followers.items() if _fits(modules[name], modules[norm]))
    if not pairs:
        return ()
    _unsettle(modules[norm] for _, norm in pairs)
    with evaluation_mode(tried), torch.inference_mode():
        expected = tried(example.clone())
        try:
            got = folded(tried, pairs)(example.clone())
        except Exception:  # a network's own code may look at its norms
            return ()
    limit = LAYOUT_TOLERANCE * float(expected.abs().max())
    same = got.shape == expected.shape and float((expected - got).abs().max()) <= limit  # NaN is no proof either
    return pairs if same else ()


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


def _fits(layer: Any, norm: Any) -> bool:
    """Return whether PyTorch can fold this norm, and nothing but its plain forward pass is lost by it."""
    plain = type(layer) in LAYERS and type(norm) in NORMS and not _altered(layer) and not _altered(norm)
    return plain and all(tensor is not None for tensor in (norm.running_var, norm.weight, norm.bias))


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
                (norm.weight, 0.7, 1.3),
                (norm.bias, 0.1, 0.5),
            ):
                drawn = torch.rand(values.shape, generator=generator, dtype=torch.float32) * (high - low) + low
                values.copy_(drawn.to(values))
