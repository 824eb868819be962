"""prunegym: reinforcement learning that prunes neural networks.

`prunegym.pruning` (what is true of a network), `prunegym.envs` (the question asked), `prunegym.agent` (who decides).
Importing the package registers the environments `prunegym/Trim-v0` and `prunegym/SelectFilters-v0` with Gymnasium.
"""

from importlib.metadata import version

from prunegym.agent import (
    LearnerSettings,
    MethodSettings,
    PruneSettings,
    SearchResult,
    SearchSettings,
    prune,
    search,
)
from prunegym.agent.amc import amc
from prunegym.agent.settings import AmcSettings, TryAndLearnSettings
from prunegym.agent.try_and_learn import TryAndLearnResult, try_and_learn
from prunegym.envs import SelectFiltersEnv, SelectSettings, TrimEnv, TrimSettings
from prunegym.pruning import GroupSettings, PruningPlan, PruningTask, UserError
from prunegym.pruning.artifact import load_pruned, save_pruned
from prunegym.pruning.export import export_network

__version__ = version("prunegym")

__all__ = [
    "AmcSettings",
    "GroupSettings",
    "LearnerSettings",
    "MethodSettings",
    "PruneSettings",
    "PruningPlan",
    "PruningTask",
    "SearchResult",
    "SearchSettings",
    "SelectFiltersEnv",
    "SelectSettings",
    "TrimEnv",
    "TrimSettings",
    "TryAndLearnResult",
    "TryAndLearnSettings",
    "UserError",
    "__version__",
    "amc",
    "export_network",
    "load_pruned",
    "prune",
    "save_pruned",
    "search",
    "try_and_learn",
]
