"""Re-estimate batch-norm statistics after a cut."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .errors import UserError
from .precision import autocast, check_precision
from .tracing import evaluation_mode

BATCH_NORM_SAMPLES = 32
"""Fewest examples from which batch-norm statistics are re-estimated."""


def recalibrate(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor] | Tensor], *, precision: str = "float32"
) -> int:
    """Re-estimate every batch norm's running mean and variance from data (EagleEye, Li et al. 2020).

    Args:
        network: Changed in place; only running statistics change, modes come back.
        batches: Inputs (N, …), which are not changed, or pairs of which the first is taken.
        precision: Of the forward passes, a name from `precision.PRECISIONS`; the statistics are gathered in the
            numbers of the batch norms.

    Returns:
        Number of batch norms re-estimated (0: nothing to do, no data is read).

    Raises:
        UserError: Fewer than `BATCH_NORM_SAMPLES` examples came, or some that are NaN or infinite, or make an
            activation so; the statistics are left as they were. Or the precision is unknown.
    """
    check_precision(precision)
    norms = [
        module
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    if not norms:
        return 0
    momenta = {norm: norm.momentum for norm in norms}
    earlier = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    samples = 0
    with evaluation_mode(network), torch.no_grad():
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # cumulative average over batches
                norm.training = True
            first = 0
            for batch in batches:
                inputs = batch if isinstance(batch, Tensor) else batch[0]
                first = first or len(inputs)
                if 2 * len(inputs) < first and samples >= BATCH_NORM_SAMPLES:
                    continue  # every batch weighs the same in a cumulative average: a short last one is left out
                if not bool(torch.isfinite(inputs).all()):
                    raise UserError(
                        "batch norm must be recalibrated on finite images, but some are NaN or infinite; "
                        "leave them out or repair them"
                    )
                samples += len(inputs)
                with autocast(precision, inputs.device):
                    network(inputs.clone())  # a network may begin in place
            if samples < BATCH_NORM_SAMPLES:
                raise UserError(
                    f"batch norm needs at least {BATCH_NORM_SAMPLES} examples to be recalibrated, but got {samples}; "
                    "give more calibration data"
                )
            if not all(bool(torch.isfinite(buffer).all()) for buffer, _ in earlier):
                raise UserError(
                    "activations must be finite for batch norm to be recalibrated, but some are NaN or infinite; "
                    "use a wider floating-point type or repair the weights"
                )
        except BaseException:
            for buffer, value in earlier:
                buffer.copy_(value)
            raise
        finally:
            for norm, momentum in momenta.items():
                norm.momentum = momentum
    return len(norms)
