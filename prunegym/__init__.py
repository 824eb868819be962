"""prunegym: reinforcement learning that prunes neural networks.

`prunegym.pruning` (what is true of a network), `prunegym.envs` (the question asked), `prunegym.agent` (who decides).
Importing the package registers the environment `prunegym/Trim-v0` with Gymnasium.
"""

from importlib.metadata import version

from prunegym.agent import LearnerSettings, SearchResult, SearchSettings, search
from prunegym.envs import TrimEnv, TrimSettings
from prunegym.pruning import GroupSettings, PruningPlan, PruningTask, UserError
from prunegym.pruning.artifact import load_pruned, save_pruned
from prunegym.pruning.export import export_network

__version__ = version("prunegym")

__all__ = [
    "GroupSettings",
    "LearnerSettings",
    "PruningPlan",
    "PruningTask",
    "SearchResult",
    "SearchSettings",
    "TrimEnv",
    "TrimSettings",
    "UserError",
    "__version__",
    "export_network",
    "load_pruned",
    "save_pruned",
    "search",
]
