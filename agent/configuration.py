"""From YAML files and options to a checked `SearchConfig`; every mistake is one sentence.

Files are read here before the parser sees them: it would take a section of the wrong type, or a second one of the
same name, for nothing and go on with default values.
"""

import dataclasses
import os
import re
from argparse import ArgumentError
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
import yaml
from jsonargparse import ArgumentParser

from .. import configs
from ..pruning.errors import UserError, closest
from .search import resolve_settings
from .settings import SearchConfig

LENGTHS = {
    f"--{section}.{one}": f"--{section}.{other}"
    for section in ("search.trim.retraining", "task.training")
    for one, other in (("updates", "epochs"), ("epochs", "updates"))
}
"""Options of which one replaces the other."""

DESCRIPTIONS = {
    "search": "Learn a pruning schedule.",
    "noise": "Measure whether the reward images of a search can tell plans apart.",
    "prune": "Prune by one method; the options above come on top: "
    "--method NAME, --compensation NAME, --accepted_drop SHARE.",
    "compare": "Compare the agent with other methods, at equal cost, over several seeds.",
}

COMPARISONS = "compare_"
"""How the names of configurations for `prunegym compare` begin."""

WANTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list such as '[1, 2]'",
    "tuple": "a list such as '[1, 2]'",
    "dict": "a mapping such as '{name: 1}'",
}


def read_config(arguments: Sequence[str], command: str = "search") -> SearchConfig:
    """Return what a command is asked for: a configuration and the options that replace its values.

    Raises:
        UserError: No configuration, an unknown key or a value of the wrong type; the nearest key is named.
    """
    return resolve(SearchConfig(**read_values(arguments, command, SearchConfig)))


def read_values(arguments: Sequence[str], command: str, kind: type) -> dict[str, Any]:
    """Return the arguments of `kind`, a settings dataclass, that a command's configuration and options give.

    Raises:
        UserError: As `read_config`.
    """
    parser = ArgumentParser(
        prog=f"prunegym {command} CONFIG", exit_on_error=False, allow_abbrev=False, description=DESCRIPTIONS[command]
    )
    parser.add_argument("--config", action="config", help="YAML file; options given after it replace its values")
    parser.add_class_arguments(kind)
    if not arguments:
        shipped = ", ".join(shipped_configs(command))
        raise UserError(f"{command} needs a configuration: a YAML file, or one of {shipped}")
    given = vars(parser.instantiate(parse(parser, _prepared(arguments, command, kind))))
    return {key: value for key, value in given.items() if key != "config"}


def stored_config(path: Path) -> tuple[SearchConfig, str]:
    """Return what a run's `config.yaml` says, not yet resolved, and its text.

    Raises:
        UserError: No task in it (the network was given as an object), or as `read_config`.
    """
    values, text = stored_values(path, SearchConfig)
    return SearchConfig(**values), text


def stored_values(path: Path, kind: type) -> tuple[dict[str, Any], str]:
    """Return the arguments of `kind` that a run's `config.yaml` gives, and its text; errors as `stored_config`."""
    content, text = _checked_file(path, kind)
    if "task" not in content:
        raise UserError(
            f"{path.parent} holds a network that was given as an object; rebuild it in Python: "
            f"prunegym.load_pruned({str(path.parent)!r}, network)"
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    try:
        parsed = parser.parse_string(text)
    except ArgumentError as error:
        raise UserError(_explained(str(error), parser, (), str(path))) from error
    return vars(parser.instantiate(parsed)), text


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Any:
    """Parse a command's arguments; a mistake is a `UserError` with the nearest known option."""
    try:
        return parser.parse_args(list(arguments))
    except ArgumentError as error:
        where = arguments[1] if arguments[:1] == ["--config"] and len(arguments) > 1 else "the configuration"
        raise UserError(_explained(str(error), parser, arguments, where)) from error


def resolve(config: SearchConfig) -> SearchConfig:
    """Move the shortcuts (`data_root`, `budget`, …) to where they belong."""
    device = resolve_device(config.device)
    trim = config.search.trim
    search_settings = replace(
        config.search,
        trim=replace(trim, budget=_either(config.budget, trim.budget)),
        max_evaluations=_either(config.max_evaluations, config.search.max_evaluations),
        max_minutes=_either(config.max_minutes, config.search.max_minutes),
        seed=_either(config.seed, config.search.seed),
    )
    search_settings = resolve_settings(search_settings)
    task = replace(config.task, data_root=config.data_root or config.task.data_root)
    shortcuts: dict[str, Any] = dict.fromkeys(("data_root", "budget", "max_evaluations", "max_minutes", "seed"))
    return replace(config, task=task, search=search_settings, device=device, **shortcuts)


def resolve_device(device: str) -> str:
    """Return the device that is meant by "auto", or the one that was typed.

    Raises:
        UserError: No name of a device, or one that this machine does not have.
    """
    if device not in ("auto", "cpu") and not re.fullmatch(r"cuda(:\d+)?", device):
        raise UserError(f"device must be auto, cpu or cuda, but got {device!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("device 'cuda' needs a GPU that PyTorch can use, but there is none; use --device cpu")
    return device


def shipped_configs(command: str = "search") -> list[str]:
    """Return the names of the configurations for a command that come with the package."""
    names = sorted(path.stem for path in _config_folder().glob("*.yaml"))
    return [name for name in names if name.startswith(COMPARISONS) == (command == "compare")]


def _config_folder() -> Path:
    return Path(configs.__file__).parent


def _either(given: Any, otherwise: Any) -> Any:
    """Return what was given as a shortcut, or the value it would replace."""
    return otherwise if given is None else given


# ---- arguments -------------------------------------------------------------------------------------------------------
def _prepared(arguments: Sequence[str], command: str, kind: type) -> list[str]:
    """Find and check the configuration files, and let updates and epochs replace each other.

    A first positional CONFIG becomes `--config FILE`. Where only one of updates and epochs is an option, the other,
    which may stand in the file, is set to 0.
    """
    if not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    pairs = list(_pairs(arguments))
    if (
        pairs[-1][1] is None
        and not pairs[-1][0].startswith("-")
        and all(option != "--config" for option, _, _ in pairs)
    ):
        pairs = [("--config", pairs[-1][0], []), *pairs[:-1]]  # CONFIG may also be the last word
    options, known = {option for option, _, _ in pairs}, dict(_known_keys(kind))
    result: list[str] = []
    for option, value, tokens in pairs:
        if option == "--config":
            if value is None:
                raise UserError("--config needs a file behind it, but there is none")
            path = _find_config(value, command)
            _checked_file(path, kind)
            tokens = ["--config", str(path)]
        elif value is not None and known.get(option[2:]):
            _check_section(option, value, known)
        result += tokens
        other = LENGTHS.get(option)
        if other and other not in options and not _is_zero(value):
            result += [other, "0"]
    return result


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str | None, list[str]]]:
    """Yield (option, its value, its tokens); a token that belongs to no option comes alone."""
    place = 0
    while place < len(arguments):
        token = arguments[place]
        option, equals, value = token.partition("=")
        following = arguments[place + 1 : place + 2]
        if equals or not token.startswith("--") or not following or following[0].startswith("--"):
            yield option, value if equals else None, [token]
            place += 1
        else:
            yield token, following[0], [token, *following]
            place += 2


def _is_zero(value: str | None) -> bool:
    try:
        return value is not None and float(value) == 0
    except ValueError:
        return False


def _find_config(given: str, command: str) -> Path:
    """Return the file that is meant: a path, or the name of a shipped one."""
    path = Path(given)
    if os.path.isfile(path):  # unlike Path.is_file, False where the name is too long
        return path
    shipped = _config_folder() / f"{path.stem}.yaml"
    if path.name == given and os.path.isfile(shipped):
        return shipped
    if os.path.isdir(path):
        raise UserError(f"a configuration must be a YAML file, but {given} is a directory; name the file in it")
    raise UserError(f"the configuration file {given} does not exist{closest(path.stem, shipped_configs(command))}")


# ---- files -----------------------------------------------------------------------------------------------------------
class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one section, of which YAML readers silently drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return the section, after looking at its keys."""
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if key.value in seen:
                raise UserError(f"a key may stand once in a section, but {key.value!r} is in lines "
                                f"{seen[key.value]} and {line}")  # fmt: skip
            seen[key.value] = line
        return super().construct_mapping(node, deep=deep)


def _checked_file(path: Path, kind: type) -> tuple[dict[str, Any], str]:
    """Return what a configuration file holds and its text; sections, keys and their names are checked."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"a configuration must be a readable text file, but {path} is not: {error}") from error
    try:
        content = yaml.load(text, _Loader)  # a SafeLoader: it makes plain data only
    except UserError as error:
        raise UserError(f"{error} ({path})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"a configuration must be YAML, but {path} is not: {reason}") from error
    if not isinstance(content, dict):
        came = "is empty" if content is None else f"holds {_short(content)}"
        raise UserError(
            f"a configuration must hold sections such as 'task: {{network: lenet_small}}', but {path} {came}; "
            "`prunegym search --help` lists the keys"
        )
    _check_keys(content, dict(_known_keys(kind)), path)
    return content, text


def _check_section(option: str, value: str, known: Mapping[str, bool]) -> None:
    """Check a whole section that is given as one option, as YAML or as the name of a file."""
    path = Path(value)
    try:
        content = yaml.load(path.read_text(encoding="utf-8") if os.path.isfile(path) else value, _Loader)
    except UserError as error:
        raise UserError(f"{error} ({option})") from error
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{option} must hold settings, but got {_short(value)}") from error
    _check_keys({option[2:]: content}, known, option)


def _known_keys(kind: type, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Yield each key, with those of the sections around it, and whether it is a section itself."""
    for name, hint in get_type_hints(kind).items():
        is_section = dataclasses.is_dataclass(hint)
        yield f"{prefix}{name}", is_section
        if is_section and isinstance(hint, type):
            yield from _known_keys(hint, f"{prefix}{name}.")


def _check_keys(content: Mapping[Any, Any], known: Mapping[str, bool], path: Path | str, prefix: str = "") -> None:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if name not in known:
            raise UserError(f"unknown key {name!r} in {path}{_near(name, list(known))}")
        if known[name] and not isinstance(value, dict):
            raise UserError(f"{name} must hold settings, but got {_short(value)} ({path})")
        if known[name]:
            _check_keys(value, known, path, f"{name}.")


def _short(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:60]


# ---- what the parser says --------------------------------------------------------------------------------------------
def _explained(message: str, parser: ArgumentParser, arguments: Sequence[str], where: str) -> str:
    """Turn the parser's words into a sentence, with the nearest known option for an unknown one."""
    known = [action.dest for action in parser._actions]
    message = " ".join(message.split()).replace('"<unicode string>"', where)
    unknown = re.search(r"unrecognized arguments: (\S+)", message)
    if unknown and not unknown[1].startswith("-"):
        return f"unexpected argument {unknown[1]!r}; `{parser.prog.removesuffix(' CONFIG')} --help` shows what is taken"
    if unknown:
        name = unknown[1].lstrip("-").partition("=")[0]
        return f"unknown option --{name}{_near(name, known)}"
    group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    if group:
        name = f"{group[1]}.{group[2]}"
        return f"unknown key {name!r} in {where}{_near(name, known)}"
    key = re.search(r"(?:[Kk]ey|[Oo]ption) '?([\w.]+)'? is not (?:expected|accepted)", message)
    if key:
        return f"unknown key {key[1]!r} in {where}{_near(key[1], known)}"
    return _wrong_value(message, arguments, where) or message


def _wrong_value(message: str, arguments: Sequence[str], where: str) -> str:
    """Say which value is of the wrong type, and which type is wanted; "" where the message is about something else."""
    found = re.search(r'Parser key "([\w.]+)": (.*)', message)
    if not found:
        return ""
    name = found[1]
    options = {token.partition("=")[0] for token in arguments}
    shown = f"--{name}" if f"--{name}" in options else name
    place = "" if shown != name or where == "the configuration" else f" ({where})"
    if "Unable to load config" in found[2]:
        came = re.search(r"Unable to load config '(.*?)' - ", found[2])
        return f"{shown} must hold settings, but got {came[1] if came else 'something else'}{place}"
    value = re.search(r"(?:Given value:|Got value:) (.*)$", found[2])
    types = [*re.findall(r"Expected a <class '(\w+)'>", found[2])]
    choices = re.search(r"typing\.Literal\[(.*?)\]", found[2])
    if value is None or not (types or choices):
        return ""
    if choices:
        names = re.findall(r"'([^']*)'", choices[1])
        return f"{shown} must be a known name, but got {value[1]!r}{closest(value[1], names)}{place}"
    wanted = list(dict.fromkeys(WANTED[kind] for kind in types if kind in WANTED))
    if "a whole number" in wanted and "a number" in wanted:
        wanted.remove("a whole number")
    return f"{shown} must be {' or '.join(wanted)}, but got {value[1]}{place}" if wanted else ""


def _near(name: str, known: list[str]) -> str:
    """Name the nearest option: by the last part of the name first, then by the whole."""
    first, _, rest = name.partition(".")
    sections = {option.partition(".")[0] for option in known}
    if rest and first not in sections:
        return closest(first, sections)
    folder, _, last = name.rpartition(".")
    beside = [option.rpartition(".")[2] for option in known if option.rpartition(".")[0] == folder]
    hint = closest(last, beside) if beside else ""
    if "did you mean" in hint and folder:
        return re.sub(r"'(.*)'", rf"'{folder}.\1'", hint)
    return hint or closest(name, known)
