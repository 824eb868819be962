"""Imports point down: agent -> envs -> pruning. The source is read with `ast`; nothing is imported."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("pruning", "envs", "agent", "configs", "prunegym")
NOT_SHIPPED = {"tests", "benchmarks", "docs", "build", "dist", "runs"}


def module_name(path: Path) -> str:
    """Return the name under which a file of the repository is installed."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "prunegym" else ("prunegym", *parts))


def imports(source: str, module: str, package: bool = False) -> Iterator[str]:
    """Yield every module, and every name taken from one, that a source imports, as an absolute name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + package]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def sources(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"{folder} holds no Python file"
    return found


def imported_by(folder: str) -> list[tuple[str, str]]:
    """Return (file, imported name) pairs of a folder."""
    return [
        (str(path.relative_to(ROOT)), name)
        for path in sources(folder)
        for name in imports(path.read_text(), module_name(path), path.name == "__init__.py")
    ]


def begins(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@pytest.mark.parametrize(
    ("source", "module", "package", "expected"),
    [
        ("from ..envs import trim", "prunegym.pruning.task", False, "prunegym.envs.trim"),
        ("from .. import agent", "prunegym.pruning.task", False, "prunegym.agent"),
        ("from ..envs.trim import TrimEnv", "prunegym.pruning", True, "prunegym.envs.trim"),
        ("from ...agent import x", "prunegym.pruning.heuristics.uniform", False, "prunegym.agent.x"),
        ("from .trim import TrimEnv", "prunegym.envs", True, "prunegym.envs.trim"),
        ("def f():\n    import gymnasium as gym", "prunegym.pruning.task", False, "gymnasium"),
        ("import importlib\nimportlib.import_module('torchvision.models')", "prunegym.x", False, "torchvision.models"),
    ],
)
def test_the_walker_finds_imports(source: str, module: str, package: bool, expected: str) -> None:
    assert expected in set(imports(source, module, package))


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("pruning", ("prunegym.envs", "prunegym.agent", "gymnasium", "gym", "stable_baselines3", "sb3_contrib")),
        ("envs", ("prunegym.agent", "stable_baselines3", "sb3_contrib")),
    ],
)
def test_imports_point_down(folder: str, forbidden: tuple[str, ...]) -> None:
    pairs = imported_by(folder)
    assert any(begins(name, "prunegym.pruning") for _, name in pairs)  # the walk sees the package's own imports
    assert [pair for pair in pairs if begins(pair[1], *forbidden)] == []


@pytest.mark.parametrize("folder", ["pruning", "envs"])
def test_the_package_root_is_not_imported_from_below(folder: str) -> None:
    """`prunegym` itself imports the agent; a lower floor that imports it would reach up by a detour."""
    own = {"prunegym", *(f"prunegym.{name}" for name in ("search", "SearchSettings", "__version__"))}
    assert [pair for pair in imported_by(folder) if pair[1] in own] == []


@pytest.mark.parametrize("folder", [*FOLDERS, "tests"])
def test_no_bare_import_of_the_folders(folder: str) -> None:
    assert [pair for pair in imported_by(folder) if begins(pair[1], "pruning", "envs", "agent", "configs")] == []


def test_only_the_compatibility_module_imports_torchvision() -> None:
    users = {file for folder in FOLDERS for file, name in imported_by(folder) if begins(name, "torchvision")}
    assert users == {"pruning/torchvision_compat.py"}


def test_packages_of_pyproject_are_the_tree() -> None:
    listed = PROJECT["tool"]["setuptools"]["packages"]
    folders = PROJECT["tool"]["setuptools"]["package-dir"]
    found = {
        module_name(path): str(path.parent.relative_to(ROOT))
        for path in ROOT.rglob("__init__.py")
        if path.parent != ROOT
        and not any(part.startswith(".") or part in NOT_SHIPPED for part in path.relative_to(ROOT).parts)
    }
    assert len(listed) == len(set(listed))
    assert set(listed) == set(found)
    assert folders == found


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_with_code_is_a_package(folder: str) -> None:
    assert [path for path in sources(folder) if not (path.parent / "__init__.py").is_file()] == []


def test_constraints_pin_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text().split()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines)
    assert pins["torch"] == "2.13.0"
    assert pins["torchvision"] == "0.28.0"
    extras = PROJECT["project"]["optional-dependencies"]
    declared = [*PROJECT["project"]["dependencies"], *extras["contrib"], *extras["dev"]]
    names = {"".join(c if c.isalnum() or c in "-_" else " " for c in line).split()[0] for line in declared}
    assert len(names) > 10
    assert {name for name in names if name.lower().replace("_", "-") not in pins} == set()


def test_only_the_command_line_prints() -> None:
    printing = {
        str(path.relative_to(ROOT))
        for folder in (*FOLDERS, "tests")
        for path in sources(folder)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "Console")
    }
    assert printing == {"agent/cli.py", "agent/replay.py", "agent/progress.py"}
