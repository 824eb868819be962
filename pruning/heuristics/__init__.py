"""Methods that make plans without learning; none knows reinforcement learning."""

from .network_trimming import NetworkTrimmingSettings, network_trimming
from .ranking import RankingSettings, rank_and_cut
from .rounds import Goal, PlanRecord, Provenance, Pruned, prune_in_rounds
from .uniform import uniform

__all__ = [
    "Goal",
    "NetworkTrimmingSettings",
    "PlanRecord",
    "Provenance",
    "Pruned",
    "RankingSettings",
    "network_trimming",
    "prune_in_rounds",
    "rank_and_cut",
    "uniform",
]
