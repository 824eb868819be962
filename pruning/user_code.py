"""The user's own functions, named `module:function` or `path/to/file.py:function`.

The module's folder stays on the import path, which multiprocessing hands on to spawned children, so that a
network of the user's own class can be pickled and sent to them. Only a file that is named like another loaded
module has to be renamed for that: it is imported under a name that no other process can find.
"""

import importlib
import importlib.util
import sys
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import UserError, closest


def locate(path: str, folder: Path | None) -> str:
    """Return `path`, or where it lies below `folder` if it is relative and the working directory does not have it.

    Args:
        path: As the user typed it.
        folder: Where it was typed, such as the folder a run was started in; None = unknown.
    """
    place = Path(path).expanduser()
    if folder is None or place.is_absolute() or place.exists() or not (folder / place).exists():
        return path
    return str(folder / place)


def locate_function(name: str, folder: Path | None) -> str:
    """Return the name of a network's function that can be found from here, see `locate`.

    Args:
        name: `module:function`, `path/to/file.py:function`, or a registered network's name, which is returned.
        folder: Where it was typed. For a module that is only there, the folder is put on the import path.
    """
    place, colon, function = name.rpartition(":")
    if not colon or folder is None:
        return name
    if place.endswith(".py"):
        return f"{locate(place, folder)}:{function}"
    top = place.partition(".")[0]
    here = any((Path.cwd() / item).exists() for item in (top, f"{top}.py"))
    there = any((folder / item).exists() for item in (top, f"{top}.py"))
    if there and not here and top not in sys.modules and str(folder) not in sys.path:
        sys.path.append(str(folder))
    return name


def user_function(name: str) -> Callable[..., Any]:
    """Import the function that `module:function` or `path/to/file.py:function` names."""
    place, function = name.rsplit(":", 1)
    if not place.endswith(".py") and not all(part.isidentifier() for part in place.split(".")):
        raise UserError(f"a network of your own must be module:function or path/to/file.py:function, but got {name!r}")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    found = getattr(module, function, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        hint = closest(function, known) if known else "; define it there"
        raise UserError(f"{place!r} must have the function named after the colon, but got {function!r}{hint}")
    return found


def _import_module(name: str) -> ModuleType:
    """Import a module as `python -m` would, from the working directory first."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as problem:
        if problem.name is None or not f"{name}.".startswith(f"{problem.name}."):
            raise _failed(name, problem) from problem
        raise UserError(
            f"a network of your own is module:function, but there is no module {name!r} in {folder} or "
            "among the installed packages; check the name or give path/to/file.py:function"
        ) from problem
    except Exception as problem:
        raise _failed(name, problem) from problem


def _import_file(path: Path) -> ModuleType:
    """Import a Python file by its path, under its own name unless another module has that already."""
    if not path.is_file():
        raise UserError(
            f"a network of your own is path/to/file.py:function, but there is no file {str(path)!r} in {Path.cwd()}; "
            "check the path, or start in the folder that it is relative to"
        )
    path = path.resolve()
    name = path.stem
    loaded = sys.modules.get(name)
    if loaded is not None:
        if getattr(loaded, "__file__", None) == str(path):
            return loaded
        name = f"{name}_{zlib.crc32(str(path).encode()):08x}"
        if name in sys.modules:
            return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"a network of your own must be Python source, but got {str(path)!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before running it, as classes look up their module while they are made
    try:
        spec.loader.exec_module(module)
    except Exception as problem:
        del sys.modules[name]
        raise _failed(str(path), problem) from problem
    return module


def _failed(what: str, problem: Exception) -> UserError:
    """Say where a user's module stopped."""
    frames = traceback.extract_tb(problem.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return UserError(
        f"the module of your network must import, but {what} stops{place}: {type(problem).__name__}: {problem}"
    )
