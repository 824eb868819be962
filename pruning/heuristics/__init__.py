"""Methods that make a schedule without learning; none knows reinforcement learning."""

from .network_trimming import NetworkTrimmingResult, NetworkTrimmingSettings, network_trimming
from .uniform import uniform

__all__ = ["NetworkTrimmingResult", "NetworkTrimmingSettings", "network_trimming", "uniform"]
