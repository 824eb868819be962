"""How a cut is chosen, repaired and scored: the settings of a `Trimmer`."""

from dataclasses import dataclass
from typing import Literal

from .checks import check_seed, check_types
from .compensation import get_compensation
from .criteria import get_criterion
from .errors import UserError
from .precision import check_precision


@dataclass(frozen=True)
class RepairSettings:
    """How a cut is chosen, repaired and scored.

    Attributes:
        criterion: Which channels of a group leave, see `criteria.CRITERIA`.
        compensation: How the next layers are repaired, see `compensation.COMPENSATIONS`.
        calibration_images: Training images for statistics and Gram matrices.
        recalibration_images: Training images for batch norm; 0 = batch norm stays as it is.
        reward_images: Images of the reward split used for scoring; 0 = all.
        batch_size: Examples a forward pass.
        precision: "float32", or "bfloat16" for autocast, of batch-norm recalibration and of scores on the reward
            images: faster on GPUs and on CPUs that compute in bfloat16. Scores on the selection split are in float32.
        seed: Decides which images are drawn, in [0, 2**63).
    """

    criterion: str = "least_squares"
    compensation: str = "least_squares"
    calibration_images: int = 512
    recalibration_images: int = 512
    reward_images: int = 0
    batch_size: int = 256
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse unknown names and impossible sizes."""
        check_types(self)
        check_seed(self.seed)
        get_criterion(self.criterion)
        get_compensation(self.compensation)
        check_precision(self.precision)
        if self.calibration_images < 1 or self.recalibration_images < 0 or self.reward_images < 0:
            raise UserError(
                "calibration_images must be at least 1, recalibration_images and reward_images at least 0, but got "
                f"{self.calibration_images}, {self.recalibration_images} and {self.reward_images}"
            )
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, but got {self.batch_size}")
