"""Methods that make plans without learning; none knows reinforcement learning."""

from .network_trimming import NetworkTrimmingSettings, check_rectified, network_trimming
from .ranking import RankingSettings, check_serves, rank_and_cut
from .rounds import Goal, PlanRecord, Provenance, Pruned, prune_in_rounds
from .uniform import uniform

__all__ = [
    "Goal",
    "NetworkTrimmingSettings",
    "PlanRecord",
    "Provenance",
    "Pruned",
    "RankingSettings",
    "check_rectified",
    "check_serves",
    "network_trimming",
    "prune_in_rounds",
    "rank_and_cut",
    "uniform",
]
