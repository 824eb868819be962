"""Which groups may be cut, and to which widths: hardware likes multiples of 8, 16 or 32, and no group may vanish.

A group's allowed widths are its whole width and every multiple of `channel_multiple` that is at least `minimum_width`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import UserError
from .groups import ChannelGroup

CountArray = NDArray[np.int64]


@dataclass(frozen=True)
class GroupSettings:
    """Which groups may be cut, and to which widths. The output layer never is.

    Attributes:
        include: Patterns such as "layer3.*"; only groups with a producer that matches one are cut. Empty = all. A
            list, or one text with commas in between.
        ignore: Patterns likewise; a group with a producer that matches one is left whole.
        channel_multiple: Widths that a cut leaves are multiples of it, e.g. 8, 16 or 32; 1 = any width. A group
            narrower than one multiple stays whole.
        minimum_width: Fewest channels that a cut leaves, rounded up to a multiple; a narrower group stays whole.
    """

    include: tuple[str, ...] | str = ()
    ignore: tuple[str, ...] | str = ()
    channel_multiple: int = 1
    minimum_width: int = 1

    def __post_init__(self) -> None:
        """Refuse values outside their ranges, and bring patterns to tuples."""
        for name in ("include", "ignore"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        for name in ("channel_multiple", "minimum_width"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a whole number from 1, but got {value!r}; it counts channels, e.g. 8")

    @property
    def narrowest(self) -> str:
        """What a group can be cut down to, in words."""
        return "one channel" if self.channel_multiple == self.minimum_width == 1 else "the narrowest allowed width"

    @property
    def sizes(self) -> str:
        """What limits the widths, in words: "channel_multiple 8", or ""."""
        limiting = [name for name in ("channel_multiple", "minimum_width") if getattr(self, name) > 1]
        return ", ".join(f"{name} {getattr(self, name)}" for name in limiting)

    @property
    def limits(self) -> str:
        """What limits the reachable budget, to be put behind it: " with channel_multiple 8, ignore conv1", or ""."""
        found = [f"{name} {', '.join(getattr(self, name))}" for name in ("include", "ignore") if getattr(self, name)]
        found = [self.sizes, *found] if self.sizes else found
        return f" with {', '.join(found)}" if found else ""


class AllowedWidths:
    """The allowed widths of all groups at once, as arrays in the order of the groups.

    A group whose channels are units of several (grouped convolutions) counts units, while multiple and minimum count
    the channels that its layers have: every layer that makes the group's channels must meet them.

    Args:
        groups: Channel groups of the pristine network.
        settings: Multiple and minimum; any width from one channel by default.
    """

    def __init__(self, groups: Sequence[ChannelGroup], settings: GroupSettings | None = None) -> None:
        self.settings = settings or GroupSettings()
        multiple, minimum = self.settings.channel_multiple, self.settings.minimum_width
        units = [sorted(set(making_layers(group).values())) for group in groups]
        whole = np.array([group.width for group in groups], dtype=np.int64)
        steps = [math.lcm(*(multiple // math.gcd(multiple, unit) for unit in each)) for each in units]
        least = [-(-minimum // (min(each) * step)) * step for each, step in zip(units, steps, strict=True)]
        # whoever asks for more than a group has gets the whole group; the bound keeps the numbers within 64 bits
        self._steps = np.minimum(np.array(steps, dtype=object), whole + 1).astype(np.int64)
        self._least = np.minimum(np.array(least, dtype=object), whole).astype(np.int64)
        self._least = np.where(self._steps > whole, whole, self._least)
        self._single = bool((self._steps == 1).all())

    def smallest(self, present: CountArray) -> CountArray:
        """Return (groups,) the fewest channels allowed.

        Args:
            present: (groups,) present widths; each is allowed, whatever it is.
        """
        return np.minimum(self._least, present)

    def wider(self, counts: CountArray, present: CountArray) -> CountArray:
        """Return (groups,) the next wider allowed widths; a group at its present width stays there."""
        return np.minimum((counts // self._steps + 1) * self._steps, present)

    def not_above(self, counts: CountArray, present: CountArray) -> CountArray:
        """Return (groups,) the widest allowed widths up to `counts`, or the smallest allowed."""
        steps = np.where(counts >= present, present, counts // self._steps * self._steps)
        return np.maximum(steps, self.smallest(present))

    def not_below(self, counts: CountArray, present: CountArray) -> CountArray:
        """Return (groups,) the narrowest allowed widths from `counts` on, or the present ones."""
        return np.clip(-(-counts // self._steps) * self._steps, self.smallest(present), present)

    def nearest(self, counts: CountArray, present: CountArray) -> CountArray:
        """Return (groups,) the allowed widths nearest to `counts`, of two the narrower."""
        if self._single:  # budgets are solved at every evaluation
            return np.minimum(np.maximum(counts, self.smallest(present)), present)
        below = self.not_above(counts, present)
        above = self.wider(below, present)
        return np.where(above - counts < counts - below, above, below)


def making_layers(group: ChannelGroup) -> dict[str, int]:
    """Return the layers that make the group's channels, grouped convolutions between them too.

    Returns:
        layer -> how many of its output channels leave with one channel of the group; 1 but for units of several.
    """
    counted = [cut for cut in group.attributes if cut.attribute in ("out_channels", "out_features")]
    result = dict.fromkeys(group.producers, 1)
    for cut in counted:
        result[cut.module] = cut.per_channel
    return result


def _patterns(name: str, given: object) -> tuple[str, ...]:
    parts = given.split(",") if isinstance(given, str) else given
    if not isinstance(parts, (tuple, list)) or not all(isinstance(part, str) for part in parts):
        raise UserError(f"{name} must be a list of patterns such as 'layer3.*', but got {given!r}")
    return tuple(part.strip() for part in parts if part.strip())
