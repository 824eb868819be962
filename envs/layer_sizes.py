"""The size of layers as they are called: channels, maps, stride, kernel and MACs, seen in one forward pass."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn, no_grad
from torch.utils.flop_counter import FlopCounterMode

from ..pruning.layers import input_width
from ..pruning.tracing import evaluation_mode, hooked


@dataclass(frozen=True)
class LayerSizes:
    """What one convolution or linear layer is, and does for one example.

    Attributes:
        channels_out: Its outputs.
        channels_in: Its inputs.
        height: Of the maps it reads at its first call; 1 for a linear layer and where maps have one dimension.
        width: Likewise, 1 for a linear layer.
        stride: Largest over dimensions, 1 for a linear layer.
        kernel: Largest extent, 1 for a linear layer.
        macs: Multiply-accumulates of all its calls, by the counter of `cost.count_cost`.
    """

    channels_out: int
    channels_in: int
    height: int
    width: int
    stride: int
    kernel: int
    macs: int

    @property
    def geometry(self) -> list[int]:
        """All but the MACs."""
        return [self.channels_out, self.channels_in, self.height, self.width, self.stride, self.kernel]


def layer_sizes(network: nn.Module, names: Iterable[str], example: Tensor) -> dict[str, LayerSizes]:
    """Run one example and return the sizes of layers by name.

    Args:
        network: Comes back untouched.
        names: Convolutions and linear layers that the forward pass calls.
        example: (1, …) one input; a copy of it is used.
    """
    counter = FlopCounterMode(display=False)
    maps: dict[str, tuple[int, int]] = {}
    flops = dict.fromkeys(names, 0)
    modules: dict[str, Any] = {name: network.get_submodule(name) for name in flops}

    def before(name: str, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        read = next(iter((*inputs, *keywords.values())))
        spatial = () if isinstance(modules[name], nn.Linear) else tuple(read.shape[2:])
        height, width = (1, 1, *spatial)[-2:]
        maps.setdefault(name, (height, width))
        flops[name] -= counter.get_total_flops()

    def after(name: str) -> None:
        flops[name] += counter.get_total_flops()

    handles = []
    for name, module in modules.items():
        handles.append(
            module.register_forward_pre_hook(
                lambda _m, inputs, keywords, name=name: before(name, inputs, keywords), with_kwargs=True
            )
        )
        handles.append(module.register_forward_hook(lambda _m, _i, _o, name=name: after(name)))
    with hooked(handles), evaluation_mode(network), no_grad(), counter:
        network(example[:1].clone())
    return {
        name: LayerSizes(
            channels_out=int(module.out_features if isinstance(module, nn.Linear) else module.out_channels),
            channels_in=input_width(module),
            height=maps[name][0],
            width=maps[name][1],
            stride=max(getattr(module, "stride", (1,))),
            kernel=max(getattr(module, "kernel_size", (1,))),
            macs=flops[name] // 2,
        )
        for name, module in modules.items()
    }
