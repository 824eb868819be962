"""Methods that make plans without learning; none knows reinforcement learning."""

from .data_free import DataFreeSettings, check_mergeable, data_free
from .network_trimming import NetworkTrimmingSettings, check_rectified, network_trimming
from .ranking import RankingSettings, check_serves, rank_and_cut
from .rounds import Goal, PlanRecord, Provenance, Pruned, prune_in_rounds
from .uniform import uniform

__all__ = [
    "DataFreeSettings",
    "Goal",
    "NetworkTrimmingSettings",
    "PlanRecord",
    "Provenance",
    "Pruned",
    "RankingSettings",
    "check_mergeable",
    "check_rectified",
    "check_serves",
    "data_free",
    "network_trimming",
    "prune_in_rounds",
    "rank_and_cut",
    "uniform",
]
