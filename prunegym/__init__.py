"""prunegym: reinforcement learning that prunes neural networks.

`prunegym.pruning` (what is true of a network), `prunegym.envs` (the question asked), `prunegym.agent` (who decides).
Importing the package registers the environment `prunegym/Trim-v0` with Gymnasium.
"""

from importlib.metadata import version

from prunegym.agent import LearnerSettings, SearchResult, SearchSettings, search
from prunegym.envs import TrimEnv, TrimSettings
from prunegym.pruning import PruningPlan, PruningTask, UserError
from prunegym.pruning.artifact import load_pruned, save_pruned

__version__ = version("prunegym")

__all__ = [
    "LearnerSettings",
    "PruningPlan",
    "PruningTask",
    "SearchResult",
    "SearchSettings",
    "TrimEnv",
    "TrimSettings",
    "UserError",
    "__version__",
    "load_pruned",
    "save_pruned",
    "search",
]
