"""Methods that make plans without learning; none knows reinforcement learning."""

from .data_free import DataFreeSettings, check_mergeable, check_reach, data_free
from .network_trimming import NetworkTrimmingSettings, check_rectified, check_targets, network_trimming
from .plans import Goal, PlanRecord, Provenance, Pruned
from .ranking import RankingSettings, check_floor, check_serves, rank_and_cut
from .rounds import prune_in_rounds
from .uniform import uniform

__all__ = [
    "DataFreeSettings",
    "Goal",
    "NetworkTrimmingSettings",
    "PlanRecord",
    "Provenance",
    "Pruned",
    "RankingSettings",
    "check_floor",
    "check_mergeable",
    "check_reach",
    "check_rectified",
    "check_serves",
    "check_targets",
    "data_free",
    "network_trimming",
    "prune_in_rounds",
    "rank_and_cut",
    "uniform",
]
