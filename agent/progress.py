"""Live progress on the terminal; silent unless asked for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from tqdm import tqdm

from .history import History


@dataclass(frozen=True)
class Progress:
    """Shows what runs and how long it will take.

    Attributes:
        enabled: False = nothing is printed.
    """

    enabled: bool = False

    def say(self, text: str) -> None:
        """Print one line."""
        if self.enabled:
            Console(highlight=False, soft_wrap=True).print(text, markup=False)

    @contextmanager
    def updates(self, label: str, total: int | None, unit: str = "update") -> Iterator[Callable[[int], None]]:
        """Show a bar of optimizer steps (`total` None: not known yet); yields a function that takes the number done.

        The bar appears with the first step: there may be none, where weights are given or kept from an earlier run.
        Another `unit`, such as "eval", counts what else may or may not come.
        """
        bar: Any = None

        def show(done: int) -> None:
            nonlocal bar
            if bar is None:
                bar = self._bar(label, total, unit)
            bar.update(done - bar.n)

        try:
            yield show
        finally:
            if bar is not None:
                bar.close()

    @contextmanager
    def evaluations(self, label: str, total: int) -> Iterator[Callable[[History], None]]:
        """Show a bar of evaluations with the best accuracy so far; yields a function that takes the history."""
        with self._bar(label, total, "eval") as bar:

            def show(history: History) -> None:
                best = history.best
                if best is not None:
                    bar.set_postfix_str(f"best {best.accuracy:.4f} at {best.kept:.1%}", refresh=False)
                bar.update(history.spent - bar.n)

            yield show

    def _bar(self, label: str, total: int | None, unit: str) -> Any:
        return tqdm(total=total, desc=label, unit=unit, disable=not self.enabled, leave=True, mininterval=0.5)
