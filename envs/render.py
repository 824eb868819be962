"""Pictures of an episode: how wide each group still is."""

from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

BAR = 40  # characters of a full-width bar


def widths_text(names: Sequence[str], before: Sequence[int], after: Sequence[int], title: str) -> str:
    """Return one line per group: name, bar of the share kept, kept / original width."""
    longest = max(len(name) for name in names)
    lines = [title]
    for name, whole, kept in zip(names, before, after, strict=True):
        filled = max(1, round(BAR * kept / whole))
        lines.append(f"{name:<{longest}}  {'█' * filled}{'·' * (BAR - filled)}  {kept}/{whole}")
    return "\n".join(lines) + "\n"


def widths_image(names: Sequence[str], before: Sequence[int], after: Sequence[int], title: str) -> NDArray[np.uint8]:
    """Return (H, W, 3) uint8: bars of the widths kept against the original's."""
    figure = Figure(figsize=(6.4, max(2.0, 0.32 * len(names) + 1.1)), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = np.arange(len(names))
    axes.barh(places, before, color="#d8dee6", label="original")
    axes.barh(places, after, color="#2f6db3", label="kept")
    for place, (whole, kept) in enumerate(zip(before, after, strict=True)):
        axes.text(whole, place, f" {kept}/{whole}", va="center", fontsize=8)
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(before) * 1.18)
    axes.set_xlabel("channels")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, loc="lower right")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
