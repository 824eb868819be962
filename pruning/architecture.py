"""A pruned architecture as a small file that a person can read and edit: which network, and how wide each group is.

It holds no weights. `networks.build_architecture` builds it with random ones, and `architecture.yaml` in place of a
network's name makes a task of it, so that training it from scratch is the ordinary training. Channel groups are found
anew when it is built; of each the first channels stay, which with random weights are as good as any.
"""

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .checks import check_keys, check_types
from .cost import Cost
from .errors import UserError
from .manifest import relative_folder
from .narrowing import GROUP_WIDTHS, check_widths
from .plan import PruningPlan
from .user_code import locate_function

FORMAT = 1
FILE = "architecture.yaml"
SUFFIXES = (".yaml", ".yml")

HEADER = """\
# A pruned architecture without weights. Widths may be edited; a group that is not named stays as wide as it was.
# In place of a network's name (--task.network THIS_FILE) it is trained from scratch, or pruned further.
"""
KEYS = {
    "format": str(FORMAT), "network": "lenet5_caffe", "arguments": "{}", "classes": "10", "input_shape": "[1, 28, 28]",
    "started_in": "..", "widths": "{conv1: 6}", "found_by": "{}",
}  # fmt: skip
NEEDED = ("network", "input_shape", "widths")
ON_A_LINE = ("arguments", "input_shape")


@dataclass(frozen=True)
class Origin:
    """Where the widths come from, for people; nothing is built from it.

    Attributes:
        made_by: Who made the plan, e.g. "agent" or "uniform".
        budget: Share of the cost that was to be kept, in (0, 1]; None where another goal decided.
        budget_unit: "macs" or "params"; None without a budget.
        params: Parameters.
        macs: Multiply-accumulates of one example.
        params_kept: Relative to the network that was pruned, in (0, 1].
        macs_kept: Likewise.
        prunegym: The version that wrote the file.
    """

    made_by: str = ""
    budget: float | None = None
    budget_unit: str | None = None
    params: int | None = None
    macs: int | None = None
    params_kept: float | None = None
    macs_kept: float | None = None
    prunegym: str = ""

    def __post_init__(self) -> None:
        """Refuse values of other types."""
        check_types(self)

    @classmethod
    def of(cls, made_by: str, cost: Cost, whole: Cost, budget: float | None, budget_unit: str | None) -> "Origin":
        """Describe a network of `cost` that was cut from one of cost `whole`."""
        return cls(
            made_by=made_by,
            budget=budget,
            budget_unit=None if budget is None else budget_unit,
            params=cost.params,
            macs=cost.macs,
            params_kept=round(cost.params / whole.params, 6),
            macs_kept=round(cost.macs / whole.macs, 6),
            prunegym=importlib.metadata.version("prunegym"),
        )


@dataclass(frozen=True)
class Architecture:
    """A network's name, what it is built with, and the width of its channel groups.

    Attributes:
        network: Built-in or torchvision name, `module:function` or `path/to/file.py:function`; None where the network
            was passed in as an object.
        input_shape: Of one input without the batch, (C, H, W) for images.
        widths: Channels by group, 1 or more; a group that is not named stays whole.
        arguments: Keyword arguments of the network.
        classes: Number of outputs; None = the network's own.
        started_in: For a function of the user's own, the folder in which its name was typed, relative to the file.
        found_by: Where the widths come from.

    Raises:
        UserError: A value of another type, or below 1.
    """

    network: str | None
    input_shape: tuple[int, ...]
    widths: dict[str, int]
    arguments: dict[str, Any] = field(default_factory=dict)
    classes: int | None = None
    started_in: str | None = None
    found_by: Origin = field(default_factory=Origin)

    def __post_init__(self) -> None:
        """Refuse values of other types or below 1."""
        check_types(self)
        object.__setattr__(self, "input_shape", tuple(self.input_shape))
        if not self.input_shape or min(self.input_shape) < 1:
            raise UserError(
                f"input_shape must be positive numbers such as [3, 32, 32], but got {list(self.input_shape)}"
            )
        if self.classes is not None and self.classes < 1:
            raise UserError(f"classes must be 1 or more, but got {self.classes}")
        check_widths(self.widths)

    @classmethod
    def of(
        cls, source: Mapping[str, Any], plan: PruningPlan, input_shape: Sequence[int], folder: Path, found_by: Origin
    ) -> "Architecture":
        """Describe what a plan leaves of a task's network, for a file in `folder`.

        Args:
            source: Of the task, as `prepare_task` records it; empty where the network was passed in as an object.
            plan: What stays.
            input_shape: Of one input without the batch.
            folder: Where the file will lie; the place of the user's own function is written as seen from there.
            found_by: Where the widths come from.

        Raises:
            UserError: The network's arguments cannot be written as plain text.
        """
        name = source.get("network")
        arguments = dict(source.get("network_arguments") or {})
        earlier = arguments.pop(GROUP_WIDTHS, {})
        try:
            arguments = json.loads(json.dumps(arguments))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"a network's arguments must be plain numbers, texts and lists to be written, but: {error}; "
                "put them into a function of your own and name that as the network"
            ) from error
        started_in = None
        if name is not None and ":" in name:
            place, function = name.rsplit(":", 1)
            typed_in = Path(source.get("started_in", "."))
            started_in = relative_folder(typed_in, folder)
            if Path(place).is_absolute():
                name = f"{relative_folder(place, typed_in)}:{function}"
        return cls(
            network=name,
            input_shape=tuple(input_shape),
            widths={**earlier, **plan.counts},
            arguments=arguments,
            classes=source.get("classes"),
            started_in=started_in,
            found_by=found_by,
        )

    @classmethod
    def from_dict(cls, data: Any) -> "Architecture":
        """Read the content of a file.

        Raises:
            UserError: Not a mapping, a key that is missing or unknown, or a value of the wrong type.
        """
        given = dict(check_keys(data, KEYS, "an architecture"))
        missing = [key for key in NEEDED if key not in given]
        if missing:
            raise UserError(f"an architecture must hold {', '.join(NEEDED)}, but has no {missing[0]!r}; add it")
        found = given.pop("format", FORMAT)
        if found != FORMAT:
            raise UserError(f"an architecture must have format {FORMAT}, but got {found!r}; write it anew")
        known = {item.name: "" for item in dataclasses.fields(Origin)}
        given["found_by"] = Origin(**check_keys(given.get("found_by"), known, "found_by"))
        if given.get("arguments", 0) is None:
            del given["arguments"]
        return cls(**given)

    @classmethod
    def load(cls, path: str | Path) -> "Architecture":
        """Read a file. The user's own function is looked for in the working directory, then where it was typed.

        Raises:
            UserError: The file is missing, no YAML or no architecture; the file is named.
        """
        path = Path(path).expanduser()
        try:
            found = cls.from_dict(yaml.load(path.read_text(encoding="utf-8"), _Loader))
        except OSError as error:
            raise UserError(f"an architecture file must be readable, but {path} is not: {error.strerror}") from error
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"an architecture must be YAML, but {path} is not: {reason}; correct it there") from error
        if found.network is None:
            return found
        typed_in = (path.resolve().parent / (found.started_in or ".")).resolve()
        located = locate_function(found.network, typed_in)
        return dataclasses.replace(found, network=located)

    def build_arguments(self, where: str) -> tuple[str, dict[str, Any]]:
        """Return the network's name and its arguments, the widths of its groups among them, for `build_network`.

        Args:
            where: Where the architecture was found, for the error.

        Raises:
            UserError: The network was passed in as an object.
        """
        if self.network is None:
            raise UserError(
                f"an architecture must name its network to be built, but {where} says null; "
                "pass the network: build_architecture(architecture, network=network)"
            )
        return self.network, {**self.arguments, GROUP_WIDTHS: self.widths}

    def to_yaml(self) -> str:
        """Return the content of the file, one group a line."""
        found_by = {key: value for key, value in dataclasses.asdict(self.found_by).items() if value not in (None, "")}
        content: dict[str, Any] = {"format": FORMAT, "network": self.network, "arguments": self.arguments}
        if self.classes is not None:
            content["classes"] = self.classes
        content["input_shape"] = list(self.input_shape)
        if self.started_in is not None:
            content["started_in"] = self.started_in
        content["widths"] = self.widths
        if found_by:
            content["found_by"] = found_by
        parts = [
            yaml.safe_dump({key: value}, sort_keys=False, default_flow_style=None if key in ON_A_LINE else False)
            for key, value in content.items()
        ]
        return HEADER + "".join(parts)

    def save(self, path: str | Path) -> None:
        """Write the file."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")


def is_architecture(name: str) -> bool:
    """Return whether a network's name is that of an architecture file."""
    return ":" not in name.rpartition("/")[2] and name.endswith(SUFFIXES)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)
