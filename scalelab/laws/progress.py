"""A progress bar for what takes longer than two seconds; nothing, and no import, for what does not."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

PATIENCE = 2.0  # seconds before a bar appears


@contextlib.contextmanager
def progress(total: int, label: str) -> Iterator[Callable[[float], None]]:
    """Yields `advance(steps)`. The bar goes to standard error and leaves nothing behind."""
    began, done, bar, task = time.monotonic(), 0.0, None, None

    def advance(steps: float) -> None:
        nonlocal done, bar, task
        done += steps
        if bar is None and done < total and time.monotonic() - began > PATIENCE:
            from rich.console import Console
            from rich.progress import Progress

            bar = Progress(console=Console(stderr=True), transient=True)
            bar.start()
            task = bar.add_task(label, total=total)
        if bar is not None and task is not None:
            bar.update(task, completed=done)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()
