"""A progress bar for what takes longer than two seconds; nothing, and no import, for what does not."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

PATIENCE = 2.0  # seconds before a bar appears


@contextlib.contextmanager
def progress(total: int, label: str) -> Iterator[Callable[[float], None]]:
    """Yields `advance(steps)`. The bar goes to standard error, or below a notebook's cell, and leaves nothing."""
    began, done = time.monotonic(), 0.0
    bar: Any = None

    def advance(steps: float) -> None:
        nonlocal done, bar
        done += steps
        if bar is None and done < total and time.monotonic() - began > PATIENCE:
            bar = (_Cell if _in_kernel() else _Terminal)(label, total)
        if bar is not None:
            bar.show(done)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()


def _in_kernel() -> bool:
    """Whether this runs in a notebook's kernel, and not merely beside its modules or in IPython's terminal."""
    ipython: Any = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class _Terminal:
    def __init__(self, label: str, total: int):
        from rich.console import Console
        from rich.progress import Progress

        self.bar = Progress(console=Console(stderr=True), transient=True)
        self.bar.start()
        self.task = self.bar.add_task(label, total=total)

    def show(self, done: float) -> None:
        self.bar.update(self.task, completed=done)

    def stop(self) -> None:
        self.bar.stop()


class _Cell:
    """A line of text below the cell; rich would need ipywidgets there, and warns where they are missing."""

    def __init__(self, label: str, total: int):
        from IPython.display import display  # type: ignore[import-not-found]  # there, where there is a kernel

        self.label, self.total, self.text = label, total, ""
        self.handle: Any = display({"text/plain": ""}, raw=True, display_id=True)

    def show(self, done: float) -> None:
        self._write(f"{self.label}: {done / self.total:.0%}")

    def stop(self) -> None:
        self._write("")

    def _write(self, text: str) -> None:
        if text != self.text:
            self.text = text
            self.handle.update({"text/plain": text}, raw=True)
