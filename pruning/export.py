"""A network as one file for other runtimes, which gets its name only after it computes what PyTorch computes."""

import contextlib
import importlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .artifact import load_for, read_manifest
from .copying import copy_network
from .errors import UserError, closest
from .manifest import DTYPES

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
BATCHES = (1, 2, 5)
LARGEST_ONNX = 2**31 - 2**20  # bytes; an ONNX file is one protobuf message, which ends at 2 GiB


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The file.
        format: "onnx" or "torch".
        size: In bytes.
        opset: Version of ONNX's operators; None for the format "torch".
        difference: Largest difference from PyTorch's output, relative to the largest magnitude of that output.
    """

    path: Path
    format: str
    size: int
    opset: int | None
    difference: float


def export_network(
    network: nn.Module,
    example: Tensor,
    path: str | Path,
    format: str = "onnx",
    tolerance: float = 1e-4,
    *,
    metadata: Mapping[str, str] | None = None,
) -> Exported:
    """Write a network as one file with a dynamic batch dimension, and check it before it gets its name.

    The file's input is called `images`, its output `logits`. Both are compared with the network in evaluation mode on
    the CPU for 1, 2 and 5 random inputs, ONNX in onnxruntime, `torch` after loading the file again.

    Args:
        network: Returns one tensor (N, ...) for inputs (N, ...); it is left untouched.
        example: (1, C, H, W) one input, of the network's floating-point type; its values do not matter.
        path: The file; ends in .onnx or .pt2. An older file of this name is replaced.
        format: "onnx", or "torch" for `torch.export.load`.
        tolerance: Largest accepted difference, relative to the largest magnitude of the output; above 0.
        metadata: Texts kept in the file: in the ONNX model's properties, or in the extra file `metadata.json`.

    Returns:
        What was written and how much it differs.

    Raises:
        UserError: A setting is out of range, a package is missing, the network cannot be exported, or what the file
            computes differs. No file is left then, and an older one stays as it was.
    """
    path = Path(path)
    _check_request(network, example, path, format, tolerance)
    runtime = _onnx_packages() if format == "onnx" else None
    network = copy_network(network).cpu().eval()
    inputs = example.detach().cpu()[:1]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _draft_of(path) as draft:
            with _quiet():
                program = _trace(network, inputs)
                opset, run = _write(program, inputs, draft, runtime, dict(metadata or {}))
                difference = _difference(network, run, inputs, tolerance)
            _check_difference(difference, tolerance, format, inputs.dtype)
            size = draft.stat().st_size
            draft.replace(path)
    except OSError as error:
        raise UserError(f"{path} must be writable, but is not: {error.strerror or error}; choose another") from error
    return Exported(path, format, size, opset, difference)


def export_pruned(
    folder: str | Path,
    *,
    format: str = "onnx",
    output: str | Path | None = None,
    tolerance: float = 1e-4,
    network: nn.Module | None = None,
) -> Exported:
    """Export a saved network.

    The file keeps the network's name and the data's mean and standard deviation as metadata.

    Args:
        folder: What `save_pruned` wrote, such as a run folder.
        format: "onnx" or "torch".
        output: The file; by default `pruned.onnx` or `pruned.pt2` in the folder.
        tolerance: As in `export_network`.
        network: As in `load_pruned`.

    Raises:
        UserError: As `load_pruned` and `export_network`.
    """
    _check_format(format)
    manifest = read_manifest(folder)
    example = torch.zeros(manifest.example_shape, dtype=DTYPES[manifest.dtype])
    metadata = {"made_by": f"prunegym {manifest.versions.get('prunegym', '')}".strip()}
    if manifest.network is not None:
        metadata["network"] = manifest.network.name
    if manifest.data is not None:
        metadata["data"] = manifest.data.name
        if manifest.data.mean is not None and manifest.data.std is not None:
            metadata["mean"] = json.dumps(manifest.data.mean)
            metadata["std"] = json.dumps(manifest.data.std)
            metadata["input"] = "pixels in [0, 1], minus mean, divided by std, per channel"
    path = Path(folder) / f"pruned{SUFFIXES[format]}" if output is None else Path(output)
    original = load_for(folder, network, "in Python, prunegym.pruning.export.export_pruned(folder, network=network)")
    return export_network(original, example, path, format, tolerance, metadata=metadata)


def _check_format(format: str) -> None:
    if format not in SUFFIXES:
        raise UserError(f"format must be one of {', '.join(SUFFIXES)}, but got {format!r}{closest(format, SUFFIXES)}")


def _check_request(network: nn.Module, example: Tensor, path: Path, format: str, tolerance: float) -> None:
    _check_format(format)
    if path.suffix != SUFFIXES[format]:
        raise UserError(f"a file of format {format!r} must end in {SUFFIXES[format]}, but got {str(path)!r}; rename it")
    if not 0 < tolerance < float("inf"):
        raise UserError(f"tolerance must be above 0, but got {tolerance=}; it is relative to the largest output")
    if not isinstance(network, nn.Module):
        raise UserError(f"network must be a torch.nn.Module, but got {type(network).__name__}; pass the network itself")
    if not isinstance(example, Tensor):
        raise UserError(f"example must be one input (1, ...) as a tensor, but got {example!r:.80}; pass one image")
    if not example.is_floating_point() or example.dim() < 2 or len(example) < 1:
        raise UserError(
            "example must be one input (1, ...) of a floating-point type, but got "
            f"{example.dtype} {tuple(example.shape)}; pass one normalised image"
        )


def _onnx_packages() -> ModuleType:
    """Import what the format needs, and return onnxruntime."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            package = importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"the format 'onnx' needs the package {name!r}, but it cannot be imported ({error}); "
                "pip install 'prunegym[export]', or use the format 'torch'"
            ) from error
    return package


def _trace(network: nn.Module, inputs: Tensor) -> torch.export.ExportedProgram:
    """Trace with two inputs: a batch of one would be taken for a constant."""
    pair = torch.cat([inputs, inputs])
    try:
        with torch.no_grad():
            output = network(pair)
    except Exception as error:
        raise UserError(
            f"the network must take inputs of shape {tuple(pair.shape)}, but stops: {_first_line(error)}; "
            "pass an example that fits"
        ) from error
    if not isinstance(output, Tensor):
        kind = type(output).__name__
        raise UserError(f"a network to export must return one tensor (N, ...), but returns {kind}; wrap it")
    try:
        return torch.export.export(network, (pair,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:
        raise UserError(
            f"a network to export must run for any number of inputs without looking at their values, but "
            f"torch.export refused it: {_first_line(error)}; change its forward"
        ) from error


def _write(
    program: torch.export.ExportedProgram,
    inputs: Tensor,
    draft: Path,
    runtime: ModuleType | None,
    metadata: dict[str, str],
) -> tuple[int | None, Callable[[Tensor], Tensor]]:
    """Write the draft and open it again; returns ONNX's opset and what runs the file."""
    if runtime is None:
        try:
            torch.export.save(program, draft, extra_files={"metadata.json": json.dumps(metadata)})
        except RuntimeError as error:  # also what a full disk raises here
            raise UserError(f"the network cannot be written to {draft.parent}: {_first_line(error)}") from error
        return None, torch.export.load(draft).module()
    state = {id(tensor): tensor.nbytes for tensor in program.state_dict.values()}
    if sum(state.values()) > LARGEST_ONNX:
        raise UserError(
            f"one ONNX file holds at most 2 GiB, but the network has {sum(state.values()) / 2**30:.1f} GiB; "
            "use the format 'torch'"
        )
    try:
        model: Any = torch.onnx.export(
            program, (torch.cat([inputs, inputs]),), dynamo=True, verbose=False, input_names=["images"],
            output_names=["logits"], dynamic_shapes=({0: "batch"},), external_data=False,
        )  # fmt: skip
        model.model.metadata_props.update(metadata)
        model.save(draft, external_data=False)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = runtime.InferenceSession(str(draft), options, providers=["CPUExecutionProvider"])
    except OSError:
        raise
    except Exception as error:
        raise UserError(
            f"a network to export must run in onnxruntime, but cannot: {_first_line(error)}; "
            "make it float32 or use the format 'torch'"
        ) from error
    return model.model.opset_imports[""], lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


def _difference(network: nn.Module, run: Callable[[Tensor], Tensor], inputs: Tensor, tolerance: float) -> float:
    """Return the largest relative difference over batches of random inputs; infinite for other shapes or NaN.

    Raises:
        UserError: The file does not take some batch, or the network differs from itself by more than the tolerance.
    """
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch in BATCHES:
        x = torch.randn((batch, *inputs.shape[1:]), generator=generator).to(inputs.dtype)
        with torch.no_grad():
            try:
                expected, again, got = network(x), network(x), run(x)
            except Exception as error:
                raise UserError(
                    f"the exported file must take any number of inputs, but stops for {batch}: {_first_line(error)}; "
                    "use another format"
                ) from error
        if expected.shape == again.shape and _relative(expected, again) > tolerance and expected.isfinite().all():
            raise UserError(
                "a network to export must compute the same from the same input, but two passes in evaluation mode "
                "differ; take out what draws random numbers or counts its calls"
            )
        if expected.shape != got.shape:
            return float("inf")
        worst = max(worst, _relative(expected, got))
    return worst


def _relative(expected: Tensor, got: Tensor) -> float:
    """Return the largest difference, relative to the largest magnitude expected; infinite for NaN."""
    found = float((expected.double() - got.double()).abs().max()) / max(float(expected.abs().max()), 1e-12)
    return found if found == found else float("inf")


def _check_difference(difference: float, tolerance: float, format: str, dtype: torch.dtype) -> None:
    if difference <= tolerance:
        return
    ways = ["raise the tolerance"]
    if format == "onnx":
        ways.append("use the format 'torch'")
    if dtype in (torch.float16, torch.bfloat16):
        ways.insert(0, "export a float32 network")
    raise UserError(
        f"the exported file must compute the network's outputs to {tolerance:g} of their largest, but differs "
        f"by {difference:.3g}; {' or '.join(ways)}"
    )


@contextlib.contextmanager
def _draft_of(path: Path) -> Iterator[Path]:
    """Name a file beside `path` that is gone in the end, unless it was renamed."""
    draft = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporters say to themselves; errors are raised and told anyway."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        heard = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
