"""From a resolved configuration to the task it describes: data, network, threads."""

from collections.abc import Callable
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from ..envs.trim_settings import check_request
from ..pruning.prepare import prepare_task
from ..pruning.task import PruningTask
from .compare_settings import CompareConfig
from .progress import Progress
from .randomness import derive_seed
from .settings import SearchConfig


def load_task(
    config: SearchConfig | CompareConfig,
    progress: Progress,
    folder: Path | None = None,
    check: Callable[[nn.Module, Tensor], None] | None = None,
) -> PruningTask:
    """Load data and network as a resolved configuration says, with its number of threads; train what has no weights.

    Relative paths that the working directory does not have are looked for in `folder`. Before anything is trained,
    `check` may refuse the network; by default that is what a search would refuse.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
        threadpool_limits(config.threads, user_api="blas")  # NumPy's own threads
    training = config.task.training
    with progress.updates("train network", None if training.epochs else max(1, training.updates)) as show:
        return prepare_task(
            config.task,
            seed=derive_seed(config.search.seed, "task"),
            device=config.device,
            progress=show,
            check=check or (lambda network, example: check_request(network, example, config.search.trim)),
            folder=folder,
        )
