"""What a network costs: parameters and multiply-accumulates (MACs), counted and predicted.

`count_cost` counts a network as it is, by PyTorch's own operator-level counter. `CostModel` predicts the cost
of any plan from the groups' index maps in microseconds, so that a budget can be solved for; a test holds the
two equal on cut networks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .errors import UserError
from .groups import ChannelGroup, IndexArray
from .tracing import evaluation_mode, hooked
from .widths import AllowedWidths, GroupSettings

UNITS = ("macs", "params")


@dataclass(frozen=True)
class Cost:
    """Cost of one network.

    Attributes:
        params: Number of parameters.
        macs: Multiply-accumulates of one example's forward pass (convolutions and matrix products).
        uncounted: Types of executed layers whose arithmetic is not in `macs`.
    """

    params: int
    macs: int
    uncounted: tuple[str, ...] = ()

    def of(self, unit: str) -> int:
        """Return the amount in `unit`, `"macs"` or `"params"`."""
        return self.params if unit == "params" else self.macs


def count_cost(network: nn.Module, example_input: Tensor) -> Cost:
    """Count parameters and MACs by running one example.

    Args:
        network: Comes back untouched.
        example_input: (1, …) one example; only its first entry along dimension 0 is used, a copy of it.
    """
    executed: dict[str, None] = {}
    leaves = [module for module in network.modules() if not list(module.children())]
    handles = [
        module.register_forward_hook(lambda module, _i, _o: executed.setdefault(type(module).__name__))
        for module in leaves
    ]
    counter = FlopCounterMode(display=False)
    with hooked(handles), evaluation_mode(network), torch.no_grad(), counter:
        network(example_input[:1].clone())
    counted = ("Conv", "Linear", "MultiheadAttention", "Identity", "Dropout", "Flatten")
    return Cost(
        params=sum(parameter.numel() for parameter in network.parameters()),
        macs=counter.get_total_flops() // 2,
        uncounted=tuple(sorted(name for name in executed if not any(part in name for part in counted))),
    )


class CostModel:
    """Predicts the cost of a plan from the number of channels that stay in each group.

    Args:
        network: The network the groups were found in.
        groups: Its channel groups.
        example_input: (1, …) one example, run once to count how often each weight is used.
        settings: Which widths a plan may have; whoever solves for a budget keeps to `allowed`. Any by default.
    """

    def __init__(
        self,
        network: nn.Module,
        groups: Sequence[ChannelGroup],
        example_input: Tensor,
        settings: GroupSettings | None = None,
    ) -> None:
        self.names = tuple(group.name for group in groups)
        self.widths = np.array([group.width for group in groups], dtype=np.int64)
        self.allowed = AllowedWidths(groups, settings)
        self.full = count_cost(network, example_input)
        uses = _uses_per_weight(network, example_input)
        tensors = list(network.parameters())
        row_of = {id(tensor): row for row, tensor in enumerate(tensors)}
        index = {name: row_of[id(tensor)] for name, tensor in network.named_parameters(remove_duplicate=False)}
        most = max((tensor.dim() for tensor in tensors), default=1)
        sizes = np.ones((len(tensors), most))
        falls = np.zeros((len(tensors), most, len(groups)))
        for row, tensor in enumerate(tensors):
            sizes[row, : tensor.dim()] = tensor.shape
        for column, group in enumerate(groups):
            entries: dict[tuple[int, int], list[IndexArray]] = {}  # a tensor of several names is in several slices
            for piece in group.slices:
                if piece.tensor in index:
                    entries.setdefault((index[piece.tensor], piece.dim), []).append(piece.index)
            for (row, dim), parts in entries.items():
                falls[row, dim, column] = len(np.unique(np.concatenate(parts))) / group.width
        self._sizes = sizes
        self._falls = falls
        self._uses = np.array([uses.get(id(tensor), 0) for tensor in tensors], dtype=np.float64)
        self._rest = self.full.macs - round(float(self._uses @ sizes.prod(1)))

    def cost(self, counts: Mapping[str, int] | NDArray[np.int64]) -> Cost:
        """Return the cost when `counts` channels stay.

        Args:
            counts: By group name (a group that is not named stays whole), or (groups,) in order.
        """
        if isinstance(counts, Mapping):
            counts = np.array(
                [counts.get(name, width) for name, width in zip(self.names, self.widths, strict=True)],
                dtype=np.int64,
            )
        params, macs = self._elements(counts[None])
        return Cost(params=int(params[0]), macs=int(macs[0]), uncounted=self.full.uncounted)

    def costs(self, counts: NDArray[np.int64], unit: str) -> NDArray[np.int64]:
        """Return (plans,) the cost, in a unit, when (plans, groups) `counts` channels stay."""
        params, macs = self._elements(counts)
        return params if unit == "params" else macs

    def _elements(self, counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (plans,) parameters and (plans,) MACs."""
        tensors, dims, groups = self._falls.shape
        missing = self._falls.reshape(-1, groups) @ (self.widths - counts).T  # (tensors * dims, plans)
        elements = (self._sizes[:, :, None] - missing.reshape(tensors, dims, -1)).prod(1)  # (tensors, plans)
        params, macs = elements.sum(0), self._uses @ elements
        return np.rint(params).astype(np.int64), np.rint(macs).astype(np.int64) + self._rest

    def share(self, counts: Mapping[str, int] | NDArray[np.int64], unit: str) -> float:
        """Return the cost relative to the whole network, in (0, 1]."""
        return self.cost(counts).of(unit) / self.full.of(unit)

    def smallest_share(self, unit: str) -> float:
        """Return the least reachable share: the narrowest allowed width per group."""
        return self.share(self.allowed.smallest(self.widths), unit)

    def smallest_budget(self, unit: str) -> float:
        """Return the smallest reachable budget, rounded up to six digits: what is named can be typed in."""
        return math.ceil(self.smallest_share(unit) * 1e6) / 1e6

    def group_share(self, unit: str, present: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """Return (groups,) the share of the present cost that would vanish with the whole group, each in [0, 1].

        Args:
            unit: "macs" or "params".
            present: (groups,) present widths; the whole network's by default.
        """
        present = self.widths if present is None else present
        whole = self.cost(present).of(unit)
        result = np.empty(len(self.names))
        for place in range(len(self.names)):
            counts = present.copy()
            counts[place] = 0
            result[place] = 1 - self.cost(counts).of(unit) / whole
        return result

    def check_budget(self, budget: float, unit: str) -> None:
        """Refuse a budget outside (0, 1] or below what the narrowest allowed widths cost.

        Raises:
            UserError: Names the smallest reachable budget, and the settings that limit it.
        """
        if unit not in UNITS:
            raise UserError(f"budget_unit must be one of {', '.join(UNITS)}, but got {unit!r}")
        if not (isinstance(budget, (int, float)) and 0 < budget <= 1):
            raise UserError(f"budget must be in (0, 1], but got {budget=}; it is the share of {unit} to keep")
        if budget < self.smallest_share(unit):
            settings = self.allowed.settings
            raise UserError(
                f"budget must be reachable, but got {budget=}; {settings.narrowest} per group already costs "
                f"{self.smallest_budget(unit):.6f} of the {unit}, the smallest reachable budget{settings.limits}"
            )


def _uses_per_weight(network: nn.Module, example_input: Tensor) -> dict[int, int]:
    """Count, per id of a weight tensor, how often each of its elements is multiplied for one example.

    Layers that share a weight add up; a weight that is computed is not among them.
    """
    uses: dict[int, int] = {}
    handles = []
    for module in network.modules():
        if isinstance(module, nn.Linear):
            width = module.out_features
        elif isinstance(module, nn.modules.conv._ConvNd):
            width = module.out_channels
        else:
            continue

        weight = module._parameters.get("weight")
        if weight is None:
            continue

        def count(
            module: Any, inputs: tuple[Tensor, ...], output: Tensor, key: int = id(weight), width: int = width
        ) -> None:
            # a transposed convolution uses each weight once per input position, the others per output position
            transposed = getattr(module, "transposed", False)
            tensor, channels = (inputs[0], int(module.in_channels)) if transposed else (output, width)
            uses[key] = uses.get(key, 0) + tensor.numel() // channels

        handles.append(module.register_forward_hook(count))
    with hooked(handles), evaluation_mode(network), torch.no_grad():
        network(example_input[:1].clone())
    return uses
