"""`prunegym inspect`: what can be cut in a network, what cannot and why, and which budgets are reachable."""

from dataclasses import dataclass

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import nn

from ..pruning.architecture import Architecture, is_architecture
from ..pruning.checks import check_types
from ..pruning.cost import UNITS, CostModel
from ..pruning.data import DataSplits, load_data
from ..pruning.errors import UserError
from ..pruning.grouping import survey_groups
from ..pruning.groups import GroupSurvey
from ..pruning.networks import NETWORKS, build_network
from ..pruning.statistics import Statistics, measure
from ..pruning.weights import load_weights
from ..pruning.widths import GroupSettings, making_layers
from .report import short_count


@dataclass(frozen=True)
class InspectSettings:
    """What to look at.

    Attributes:
        network: Built-in or torchvision name, or `module:function`.
        weights: File with trained weights; random ones otherwise.
        data: Name of a data set; APoZ and Taylor are measured on its training images.
        data_root: Folder that holds it.
        image_size: Side of the images, in pixels; the network's usual one by default.
        channels: Colour channels of the input when no data is given.
        images: Training images that are measured.
        include: Patterns such as "layer3.*,layer4.*"; only groups with a producer that matches one are cut.
        ignore: Patterns of layers whose groups are left whole, with commas in between.
        channel_multiple: Widths that a cut leaves are multiples of it, e.g. 8, 16 or 32.
        minimum_width: Fewest channels that a cut leaves.
    """

    network: str
    weights: str | None = None
    data: str | None = None
    data_root: str | None = None
    image_size: int | None = None
    channels: int | None = None
    images: int = 256
    include: str = ""
    ignore: str = ""
    channel_multiple: int = 1
    minimum_width: int = 1

    def __post_init__(self) -> None:
        """Refuse values of other types or outside their ranges."""
        check_types(self)
        for name in ("image_size", "channels", "images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, but got {value}")


@dataclass(frozen=True, eq=False)
class Inspection:
    """What was found; `table`, `tied`, `refused` and `budgets` are for people.

    Attributes:
        network: The network that was examined.
        survey: Its groups, prunable or not.
        model: Its cost model, None where nothing can be cut.
        statistics: Measured statistics, None without data.
    """

    network: nn.Module
    survey: GroupSurvey
    model: CostModel | None
    statistics: Statistics | None

    def table(self) -> Table:
        """Return one row per prunable group; "params" and "MACs" are what vanishes with the whole group."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column("group", no_wrap=True)
        narrowest = self._narrowest()
        limited = any(count > 1 for count in narrowest)
        measured = ("APoZ", "Taylor") if self.statistics else ()
        for header in ("width", *(["least"] if limited else []), "made", "read", "params", "MACs", *measured):
            table.add_column(header, justify="right", no_wrap=True)
        if self.model is None:
            return table
        shares = [self.model.group_share(unit) for unit in ("params", "macs")]
        taylor = {}
        if self.statistics:
            sums = {
                name: float(s.taylor_2017.sum())
                for name, s in self.statistics.groups.items()
                if s.taylor_2017 is not None
            }
            summed = max(sum(sums.values()), 1e-30)
            taylor = {name: value / summed for name, value in sums.items()}
        for place, group in enumerate(self.survey.groups):
            cells: list[str | Text] = [
                Text(group.name),
                str(group.width),
                *([str(narrowest[place])] if limited else []),
                str(len(group.producers)),
                str(len(group.consumers)),
                *(
                    f"{short_count(share[place] * whole)} {100 * share[place]:.1f}%"
                    for share, whole in zip(shares, (self.model.full.params, self.model.full.macs), strict=True)
                ),
            ]
            if self.statistics:
                apoz = self.statistics.groups[group.name].apoz
                cells.append("no ReLU" if apoz is None else f"{apoz.mean():.2f}±{apoz.std():.2f}")
                cells.append(f"{100 * taylor[group.name]:.1f}%")
            table.add_row(*cells)
        return table

    def tied(self) -> list[str]:
        """Return one line per group whose channels several layers make, or whose channels are units of several."""
        lines = []
        for group in self.survey.groups:
            layers = making_layers(group)
            if len(layers) > 1 or max(layers.values()) > 1:
                names = [f"{name} ({count} channels a unit)" if count > 1 else name for name, count in layers.items()]
                lines.append(f"tied: {', '.join(names)}")
        return lines

    def refused(self) -> list[str]:
        """Return one line per group that is left whole, with its reason."""
        lines = [f"left whole: {item.name} ({item.width} channels): {item.reason}" for item in self.survey.refused]
        if self.model is None:
            return lines
        reason = f"no narrower width is allowed with {self.model.allowed.settings.sizes}"
        stuck = [
            f"left whole: {group.name} ({group.width} channels): {reason}"
            for group, narrowest in zip(self.survey.groups, self._narrowest(), strict=True)
            if narrowest == group.width > 1
        ]
        return [*stuck, *lines]

    def budgets(self) -> list[str]:
        """Return one line per unit with the whole cost and the smallest reachable budget."""
        if self.model is None:
            return ["nothing can be cut in this network"]
        whole = {"macs": f"{self.model.full.macs:,} MACs", "params": f"{self.model.full.params:,} parameters"}
        limits = self.model.allowed.settings.limits
        lines = [
            f"{whole[unit]}; budgets from {self.model.smallest_budget(unit):.6f} to 1 are reachable{limits}"
            for unit in UNITS
        ]
        return [*lines, f"not counted as MACs: {', '.join(self.model.full.uncounted) or 'nothing'}"]

    def _narrowest(self) -> list[int]:
        return [] if self.model is None else self.model.allowed.smallest(self.model.widths).tolist()


def inspect_network(settings: InspectSettings) -> Inspection:
    """Build, trace and, where data is given, measure a network.

    Raises:
        UserError: Unknown names, missing files, or a network that cannot be run or traced.
    """
    chosen = GroupSettings(settings.include, settings.ignore, settings.channel_multiple, settings.minimum_width)
    data: DataSplits | None = None
    if settings.data is not None:
        data = load_data(settings.data, root=settings.data_root, image_size=settings.image_size)
    record = NETWORKS.get(settings.network)
    if is_architecture(settings.network):
        usual = Architecture.load(settings.network).input_shape
    else:
        usual = record.image_shape if record else (3, 224, 224)
    shape = data.image_shape if data else (settings.channels or usual[0], *[settings.image_size or usual[1]] * 2)
    network = build_network(
        settings.network,
        classes=data.classes if data else None,
        in_channels=shape[0],
        image_size=shape[-1] if data or settings.image_size else None,
        seed=0,
    ).eval()
    if settings.weights is not None:
        load_weights(network, settings.weights)
    example = torch.randn((1, *shape), generator=torch.Generator().manual_seed(0))
    survey = survey_groups(network, example, include=chosen.include, ignore=chosen.ignore)
    model = CostModel(network, survey.groups, example, chosen) if survey.groups else None
    statistics = None
    if data and survey.groups:
        images = data.train.subset(min(settings.images, len(data.train)), torch.Generator().manual_seed(0))
        statistics = measure(network, survey.groups, images.batches(64), grams=False)
    return Inspection(network, survey, model, statistics)
