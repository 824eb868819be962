"""A pruning plan: which channels stay, per group. Pure data, the spine of the package.

An agent, a heuristic, a JSON file and a test can all make one; `surgery.apply_plan` is the one function that
applies it. A group that a plan does not name stays whole.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UserError, closest
from .groups import ChannelGroup

Orders = Mapping[str, Sequence[int] | NDArray[np.int64]]


class PruningPlan(Mapping[str, tuple[int, ...]]):
    """Indices of the channels that stay, by group name.

    Args:
        keep: For each group, the channels that stay (any order, no duplicates, at least one).

    Raises:
        UserError: A group would be left empty, or an index is negative, repeated or not an integer.
    """

    def __init__(self, keep: Mapping[str, Sequence[int]]) -> None:
        self._keep: dict[str, tuple[int, ...]] = {}
        for name, indices in keep.items():
            try:
                chosen = tuple(sorted(_integer(index) for index in indices))
            except (TypeError, ValueError, OverflowError):  # the last two: NaN, infinity, beyond 64 bits
                raise UserError(
                    f"a plan needs a list of channel indices per group, but got {name}: {indices!r}"
                ) from None
            if not chosen:
                raise UserError(f"a plan must leave at least one channel in each group, but {name!r} keeps none")
            if chosen[0] < 0 or len(set(chosen)) != len(chosen):
                raise UserError(f"a plan needs distinct indices from 0, but {name!r} keeps {list(indices)!r}")
            self._keep[name] = chosen

    def __getitem__(self, name: str) -> tuple[int, ...]:
        """Return the channels of group `name` that stay."""
        return self._keep[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the groups."""
        return iter(self._keep)

    def __len__(self) -> int:
        """Return the number of groups named."""
        return len(self._keep)

    def __eq__(self, other: object) -> bool:
        """Two plans are equal when they keep the same channels of the same groups."""
        return isinstance(other, PruningPlan) and self._keep == other._keep

    def __hash__(self) -> int:
        """Hash over names and indices, so that plans can be dictionary keys."""
        return hash(frozenset(self._keep.items()))

    def __repr__(self) -> str:
        """Show the widths that stay."""
        return f"PruningPlan({', '.join(f'{name}: {len(keep)}' for name, keep in self._keep.items())})"

    @classmethod
    def full(cls, groups: Sequence[ChannelGroup]) -> "PruningPlan":
        """Return the plan that keeps everything."""
        return cls({group.name: range(group.width) for group in groups})

    @classmethod
    def uniform(cls, groups: Sequence[ChannelGroup], keep: float, orders: Orders | None = None) -> "PruningPlan":
        """Keep the same share of every group.

        Args:
            groups: From `find_groups`.
            keep: Share of channels that stays, in (0, 1]; rounded to whole channels, at least one.
            orders: Channels of each group from most to least important, e.g. `criteria.rank_channels`;
                without it the first channels stay, which is meaningful for structure and cost only.

        Raises:
            UserError: `keep` is outside (0, 1].
        """
        if not (isinstance(keep, (int, float)) and 0 < keep <= 1):
            raise UserError(f"keep must be in (0, 1], but got {keep=}; it is the share of channels that stays")
        counts = {group.name: max(1, math.floor(keep * group.width + 0.5)) for group in groups}
        return cls.from_counts(groups, counts, orders)

    @classmethod
    def from_counts(
        cls, groups: Sequence[ChannelGroup], counts: Mapping[str, int], orders: Orders | None = None
    ) -> "PruningPlan":
        """Keep the `counts[name]` most important channels of each group (`orders` as in `uniform`)."""
        keep = {}
        for group in groups:
            count = counts.get(group.name, group.width)
            if not 1 <= count <= group.width:
                raise UserError(f"group {group.name!r} has {group.width} channels, but {count} were to be kept")
            order = range(group.width) if orders is None else orders[group.name]
            keep[group.name] = [int(index) for index in order[:count]]
        return cls(keep)

    @property
    def counts(self) -> dict[str, int]:
        """Number of channels that stay, by group name."""
        return {name: len(keep) for name, keep in self._keep.items()}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the canonical JSON of the plan."""
        return hashlib.sha256(json.dumps(self._keep, sort_keys=True).encode()).hexdigest()

    def completed(self, groups: Sequence[ChannelGroup]) -> "PruningPlan":
        """Check the plan against the groups and name every group.

        Raises:
            UserError: An unknown group, or an index beyond the group's width.
        """
        widths = {group.name: group.width for group in groups}
        for name, keep in self._keep.items():
            if name not in widths:
                raise UserError(f"a plan may only name groups of its network, but got {name!r}{closest(name, widths)}")
            if keep[-1] >= widths[name]:
                raise UserError(
                    f"group {name!r} has channels 0 to {widths[name] - 1}, but the plan keeps channel {keep[-1]}"
                )
        return PruningPlan({group.name: self._keep.get(group.name, range(group.width)) for group in groups})

    def then(self, later: "PruningPlan") -> "PruningPlan":
        """Compose with a plan for the network this one leaves, in this plan's numbering.

        Args:
            later: A plan whose indices count the channels that this plan keeps.

        Raises:
            UserError: `later` keeps a channel beyond what this plan leaves.
        """
        keep = dict(self._keep)
        for name, chosen in later.items():
            if name in self._keep and chosen[-1] >= len(self._keep[name]):
                raise UserError(
                    f"group {name!r} has {len(self._keep[name])} channels left, "
                    f"but the later plan keeps channel {chosen[-1]}"
                )
            keep[name] = tuple(self._keep[name][index] for index in chosen) if name in self._keep else chosen
        return PruningPlan(keep)

    def relative_to(self, earlier: "PruningPlan") -> "PruningPlan":
        """Renumber for the network that `earlier` leaves; the inverse of `earlier.then(...)`.

        Raises:
            UserError: This plan keeps a channel that `earlier` removed.
        """
        keep = {}
        for name, chosen in self._keep.items():
            if name not in earlier:
                keep[name] = chosen
                continue
            position = {channel: place for place, channel in enumerate(earlier[name])}
            missing = [channel for channel in chosen if channel not in position]
            if missing:
                raise UserError(
                    f"a later round may only keep channels the earlier one kept, but {name!r} wants {missing[:5]} back"
                )
            keep[name] = tuple(position[channel] for channel in chosen)
        return PruningPlan(keep)

    def to_dict(self) -> dict[str, list[int]]:
        """Return plain lists for JSON or YAML."""
        return {name: list(keep) for name, keep in self._keep.items()}

    @classmethod
    def from_dict(cls, data: Any) -> "PruningPlan":
        """Read what `to_dict` wrote.

        Raises:
            UserError: Not a mapping from group names to lists of integers.
        """
        if not isinstance(data, Mapping):
            raise UserError(f"a plan must map group names to lists of channels, but got {type(data).__name__}")
        return cls({str(name): indices for name, indices in data.items()})

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps({"keep": self.to_dict()}) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "PruningPlan":
        """Read a plan from JSON.

        Raises:
            UserError: The file is missing or is no plan.
        """
        try:
            data = json.loads(Path(path).read_text())
        except OSError as error:
            raise UserError(f"a plan file must be readable, but {path} is not: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"a plan file must be JSON, but {path} is not: {error}") from error
        if not isinstance(data, dict) or "keep" not in data:
            raise UserError(f"a plan file needs the key 'keep', but {path} has none")
        return cls.from_dict(data["keep"])


def _integer(value: Any) -> int:
    if isinstance(value, (bool, str)) or int(value) != value:
        raise TypeError(value)
    return int(np.int64(value))
