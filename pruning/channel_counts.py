"""The attributes in which layers keep their channel counts: read, set, and compared with the tensors."""

from typing import Any

from torch import nn

COUNTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.modules.conv._ConvNd: ("in_channels", "out_channels", "groups"),
    nn.Linear: ("in_features", "out_features"),
    nn.modules.batchnorm._NormBase: ("num_features",),
    nn.LayerNorm: ("normalized_shape",),
    nn.GroupNorm: ("num_groups", "num_channels"),
    nn.PReLU: ("num_parameters",),
}
"""The attributes that a cut lowers, by kind of layer."""


def channel_counts(module: nn.Module) -> dict[str, int]:
    """Return the attributes of a layer that count its channels; of `normalized_shape` the last entry.

    Args:
        module: Any module; one that is no such layer has none.
    """
    names = next((names for kind, names in COUNTS.items() if isinstance(module, kind)), ())
    values = {name: getattr(module, name) for name in names}
    return {name: value[-1] if isinstance(value, tuple) else value for name, value in values.items()}


def set_channel_count(module: Any, attribute: str, value: int) -> None:
    """Set one of `channel_counts`.

    Args:
        module: A layer that has the attribute.
        attribute: Its name.
        value: 1 or more; of `normalized_shape` it becomes the last entry.
    """
    if attribute == "normalized_shape":
        module.normalized_shape = (*module.normalized_shape[:-1], value)
    else:
        setattr(module, attribute, value)


def counts_fit_tensors(module: Any) -> bool:
    """Return whether the tensors of a layer have the sizes that its attributes say; True for other modules."""
    if isinstance(module, nn.modules.conv._ConvNd):
        sides = (module.out_channels, module.in_channels)
        first, second = reversed(sides) if module.transposed else sides
        expected = {"weight": (first, second // module.groups), "bias": (module.out_channels,)}
    elif isinstance(module, nn.Linear):
        expected = {"weight": (module.out_features, module.in_features), "bias": (module.out_features,)}
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        expected = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (module.num_features,))
    elif isinstance(module, nn.LayerNorm):
        expected = dict.fromkeys(("weight", "bias"), module.normalized_shape)
    elif isinstance(module, nn.GroupNorm):
        expected = dict.fromkeys(("weight", "bias"), (module.num_channels,))
    elif isinstance(module, nn.PReLU):
        expected = {"weight": (module.num_parameters,)}
    else:
        return True
    tensors = {name: tensor for name in expected if (tensor := getattr(module, name)) is not None}
    return all(tuple(tensor.shape[: len(expected[name])]) == expected[name] for name, tensor in tensors.items())
