"""The one place that imports torchvision, so that it also works beside a CPU build of torch.

The torchvision wheel of the package index is compiled against the CUDA build of torch. Beside a CPU-only
torch its compiled operators cannot load, and `import torchvision` stops with "operator torchvision::nms does
not exist" (pytorch/vision issue 9077). Data sets, transforms and models need none of these operators, so
declaring their schemas is enough. Elsewhere write `from .torchvision_compat import torchvision`.
"""

import importlib
import sys
from types import ModuleType

import torch

_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_SUBMODULES = ("torchvision.datasets", "torchvision.models", "torchvision.transforms.v2")


def declare_missing_operators() -> list[str]:
    """Declare those of torchvision's two box operators that are absent, without an implementation.

    Returns:
        The names that were declared, such as `["nms", "qnms"]`; empty where all were there already.
    """
    missing = [name for name in _OPERATORS if not hasattr(torch.ops.torchvision, name)]
    for name in missing:
        torch.library.define(f"torchvision::{name}", _SCHEMA)
    return missing


def import_torchvision() -> ModuleType:
    """Import torchvision with the submodules this package uses.

    The plain import is tried first: where the compiled operators load, they register their own schemas, and
    an earlier declaration of the same names would collide with them.

    Returns:
        The module `torchvision`, with `datasets`, `models` and `transforms.v2` loaded.

    Raises:
        RuntimeError: torchvision cannot be imported for another reason than its missing operators.
    """
    try:
        package = importlib.import_module("torchvision")
    except RuntimeError as problem:
        if "operator torchvision::" not in str(problem):
            raise
        # The submodules that did load refer to the abandoned package object: start from nothing.
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        declare_missing_operators()
        package = importlib.import_module("torchvision")
    for name in _SUBMODULES:
        importlib.import_module(name)
    return package


torchvision = import_torchvision()
