"""Who decides: the learned search, its comparison with heuristics, run folders and the command line."""

from .search import SearchResult, search
from .settings import LearnerSettings, SearchConfig, SearchSettings

__all__ = ["LearnerSettings", "SearchConfig", "SearchResult", "SearchSettings", "search"]
