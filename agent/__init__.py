"""Who decides: the learned search, its comparison with heuristics, run folders and the command line."""

from .methods import METHODS, Method
from .prune import PruneSettings, prune
from .search import SearchResult, search
from .settings import LearnerSettings, MethodSettings, SearchConfig, SearchSettings

__all__ = [
    "METHODS",
    "LearnerSettings",
    "Method",
    "MethodSettings",
    "PruneSettings",
    "SearchConfig",
    "SearchResult",
    "SearchSettings",
    "prune",
    "search",
]
