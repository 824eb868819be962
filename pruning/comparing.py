"""Compare what two networks compute: their outputs, and what layers deep inside put out."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError
from .tracing import evaluation_mode, hooked, tensors_in


def check_repeatable(network: nn.Module, inputs: Tensor, tolerance: float) -> list[Tensor]:
    """Run a network twice in evaluation mode and return its outputs.

    Args:
        network: Comes back as it was.
        inputs: A batch, not changed.
        tolerance: Largest accepted difference between the two runs relative to an output's largest magnitude.

    Raises:
        UserError: The runs differ, so that nothing can be proved of the network.
    """
    with evaluation_mode(network), torch.no_grad():
        first, second = (list(tensors_in(network(inputs.clone()))) for _ in range(2))
    alike = [one.shape == other.shape for one, other in zip(first, second, strict=True)]
    finite = all(bool(torch.isfinite(output).all()) for output in first)
    if not all(alike) or (
        finite
        and any(not largest_difference(one, other) <= tolerance for one, other in zip(first, second, strict=True))
    ):
        raise UserError(
            "a network must give the same output each time in evaluation mode, but two runs on one input differ: it "
            "draws random numbers; pass training=self.training to F.dropout, and draw noise in training mode only"
        )
    return first


def largest_difference(expected: Tensor, got: Tensor, magnitude: float | None = None) -> float:
    """Return the largest difference relative to a magnitude, the largest by default; infinity for another shape."""
    if expected.shape != got.shape or not torch.isfinite(got).all():
        return float("inf")
    if not expected.numel():
        return 0.0
    if expected.dtype == torch.bool:
        return float(not torch.equal(expected, got))
    magnitude = float(expected.abs().max()) if magnitude is None else magnitude
    return float((expected - got).abs().max()) / max(magnitude, 1e-12)


class ConsumerWatch:
    """Compares what each consumer puts out in two networks, each time it runs, relative to its own magnitude.

    A layer deep inside may count for next to nothing in the output, behind a tiny layer scale for example.
    """

    def __init__(self, rows: Mapping[str, Tensor | None]) -> None:
        self.rows = rows  # consumer -> (n,) its outputs that stay, or None for all
        self.differences: dict[str, float] = {}  # in order of execution
        self._expected: dict[str, list[tuple[Tensor, float]]] = {name: [] for name in rows}

    def recording(self, masked: nn.Module) -> AbstractContextManager[None]:
        """While it is entered, note what consumers of the masked network put out in the rows that stay."""

        def note(name: str, layer: Any, output: Tensor) -> None:
            rows = self.rows[name]
            dim = output.dim() - 1 if isinstance(layer, nn.Linear) else output.dim() + 1 - layer.weight.dim()
            # a copy either way: what comes next may work in place
            values = output.clone() if rows is None else output.index_select(dim, rows.to(output.device))
            self._expected[name].append((values, float(output.abs().max()) if output.numel() else 0.0))

        return self._hooks(masked, note)

    def comparing(self, smaller: nn.Module) -> AbstractContextManager[None]:
        """While it is entered, compare consumers of the cut network with what was noted."""

        def compare(name: str, layer: Any, output: Tensor) -> None:
            difference = math.inf  # for a run that the masked network did not have
            if self._expected[name]:
                values, magnitude = self._expected[name].pop(0)
                difference = largest_difference(values, output, magnitude) if math.isfinite(magnitude) else 0.0
            self.differences[name] = max(self.differences.get(name, 0.0), difference)

        return self._hooks(smaller, compare)

    def _hooks(self, network: nn.Module, receive: Callable[[str, Any, Tensor], None]) -> AbstractContextManager[None]:
        modules = dict(network.named_modules(remove_duplicate=False))
        return hooked(
            [
                modules[name].register_forward_hook(lambda layer, _i, output, name=name: receive(name, layer, output))
                for name in self.rows
            ]
        )
