"""What a table of right answers, plans × images, says of the reward: signal, luck, and how many images are enough."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table
from scipy import stats

from ..pruning.errors import UserError
from ..pruning.plan import PruningPlan

ENOUGH = 2.0
"""Signal to noise from which on the reward tells plans apart."""


class NotMeasurable(UserError):
    """There are not two plans and two images to measure with."""


@dataclass(frozen=True)
class Components:
    """What a table of right answers varies by: X = plan + image + luck.

    Attributes:
        signal: Standard deviation of the plans' true accuracies, as a share; sampling noise is taken off. 0 where the
            plans differ no more than luck explains.
        luck: Standard deviation of what neither the plan nor the image alone explains, for one plan and image.
        signal_to_noise: True difference of two plans over the noise of their measured difference, both as standard
            deviations, at the images of the table.
        low: Lower end of its 80 % range.
        high: Upper end; infinity where luck is 0 and the plans differ.
    """

    signal: float
    luck: float
    signal_to_noise: float
    low: float
    high: float


def variance_components(right: NDArray[np.bool_] | NDArray[np.float64]) -> Components:
    """Split a table into plans, images and luck: two-way analysis of variance with random effects, one entry a cell.

    Args:
        right: (plans, images) whether each image is right under each plan; all plans on the same images.

    Raises:
        NotMeasurable: Fewer than two plans or two images.
    """
    table = np.asarray(right, dtype=np.float64)
    if table.ndim != 2 or min(table.shape) < 2:
        raise NotMeasurable(
            f"noise needs at least two plans and two images, but got a table of shape {table.shape}; take more"
        )
    plans, images = table.shape
    means = table.mean(1)  # (plans,)
    rest = table - means[:, None] - table.mean(0) + table.mean()  # (plans, images)
    between = images * float(means.var(ddof=1))  # expected: luck² + images · signal²
    luck = float((rest**2).sum()) / ((plans - 1) * (images - 1))  # expected: luck²
    if luck <= 1e-12:  # every image is right under the same plans
        differ = between > 1e-12
        ratio = math.inf if differ else 0.0
        return Components(math.sqrt(between / images) if differ else 0.0, 0.0, ratio, ratio, ratio)
    signal = math.sqrt(max(0.0, between - luck) / images)
    freedom = plans - 1, (plans - 1) * (images - 1)

    def at(quantile: float) -> float:
        return math.sqrt(max(0.0, between / luck / quantile - 1.0))

    low, high = (at(float(stats.f.ppf(chance, *freedom))) for chance in (0.9, 0.1))
    return Components(signal, math.sqrt(luck), at(1.0), low, high)


@dataclass(frozen=True)
class NoiseReport:
    """How well a number of reward images tells plans apart.

    Attributes:
        components: Signal and luck.
        plans: Distinct plans that were scored, in the pristine numbering; the first is the uniform one.
        scored: Images on which they were scored.
        images: Reward images of the search.
        available: Images of the whole reward split.
        budget: Share of the cost that the plans keep, in (0, 1].
        unit: "macs" or "params".
        accuracies: (plans,) measured accuracies, in [0, 1].
        remarks: In which respects the rewards of the search are others than what was measured.
    """

    components: Components
    plans: tuple[PruningPlan, ...]
    scored: int
    images: int
    available: int
    budget: float
    unit: str
    accuracies: tuple[float, ...]
    remarks: tuple[str, ...] = ()

    @property
    def signal_to_noise(self) -> float:
        """True difference of two plans over the noise of the measured one, at the images of the search."""
        return self.signal_to_noise_at(self.images)

    @property
    def range(self) -> tuple[float, float]:
        """80 % range of `signal_to_noise`."""
        more = math.sqrt(self.images / self.scored)
        return more * self.components.low, more * self.components.high

    @property
    def difference(self) -> float:
        """True difference of two plans (a standard deviation), as a share."""
        return math.sqrt(2) * self.components.signal

    def noise(self, images: int) -> float:
        """Return the standard deviation, as a share, of the difference of two plans measured on the same `images`.

        The images are taken to be drawn at random; drawn in proportion to the classes, they do slightly better.

        Raises:
            UserError: `images` is below 1.
        """
        if images < 1:
            raise UserError(f"images must be at least 1, but got {images}; it is the size of a reward split")
        return self.components.luck * math.sqrt(2 / images)

    def signal_to_noise_at(self, images: int) -> float:
        """Return the signal to noise that `images` reward images would have.

        Raises:
            UserError: `images` is below 1.
        """
        if images < 1:
            raise UserError(f"images must be at least 1, but got {images}; it is the size of a reward split")
        return math.sqrt(images / self.scored) * self.components.signal_to_noise

    @property
    def enough(self) -> int | None:
        """Fewest images with a signal to noise of 2; None where that takes more than 100 times the present ones."""
        if not self.components.signal:
            return None
        images = max(2, math.ceil((ENOUGH * self.components.luck / self.components.signal) ** 2))
        return images if images <= 100 * self.images else None

    def sizes(self) -> list[int]:
        """Return sizes to compare: halves of the present one, itself, doubles up to all images, and what is enough."""
        sizes = {max(2, self.images // share) for share in (1, 2, 4, 8)}
        size = self.images
        while size < self.available:
            size = min(2 * size, self.available)
            sizes.add(size)
        if self.enough is not None:
            sizes.add(self.enough)
        return sorted(sizes)

    def table(self) -> Table:
        """Return one row per size: noise of a difference in percentage points, signal to noise."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for header in ("reward images", "noise of a difference", "signal to noise"):
            table.add_column(header, justify="right", no_wrap=True)
        table.add_column("")
        for size in self.sizes():
            remarks = ["present"] if size == self.images else []
            remarks += ["enough"] if size == self.enough else []
            cells = f"{100 * self.noise(size):.2f} points", f"{self.signal_to_noise_at(size):.2f}"
            table.add_row(f"{size:,}", *cells, ", ".join(remarks))
        return table

    def finding(self) -> str:
        """Say what was found, in one sentence."""
        low, high = self.range
        return (
            f"reward noise: two plans at {self.budget:.3g} of the {self.unit} differ by {100 * self.difference:.2f} "
            f"points, which {self.images:,} reward images measure to {100 * self.noise(self.images):.2f} points "
            f"(signal to noise {self.signal_to_noise:.1f}, 80 % range {low:.1f} to {high:.1f}, "
            f"from {len(self.plans)} plans on {self.scored:,} images)"
        )

    def advice(self) -> str:
        """Say how many reward images to take."""
        enough = self.enough
        if enough is None:
            return (
                "no difference between the plans was found: take more reward images (--task.splits.reward), a smaller "
                "budget or a larger --search.learner.noise_start"
            )
        if self.images >= enough:
            spare = "" if self.images < 2 * enough else f"; from {enough:,} on they would do, which is quicker"
            return f"{self.images:,} reward images are enough{spare}"
        needed = f"a signal to noise of {ENOUGH:g} needs {enough:,} reward images"
        if enough <= self.available:
            return f"{needed}: --search.trim.repair.reward_images {enough}"
        return f"{needed}: --task.splits.reward {enough}, or a smaller budget, where plans lie further apart"
