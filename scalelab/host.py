"""The machine and the process around a run: signals, caches, peak rates, versions, the state of the code."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import importlib.metadata
import os
import pathlib
import platform
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax

from scalelab.paths import cache_folder


@contextlib.contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM or the first SIGINT sets. Elsewhere than in the main thread it is never set."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handler(number: int, frame: Any) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice
        event.set()

    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def end_with(parent: int) -> None:
    """On Linux, this process is killed when its parent is: a worker that went on by itself would hold its run against
    the same sweep started again."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it has gone already
            os.kill(os.getpid(), signal.SIGKILL)


def use_compilation_cache() -> None:
    """XLA's persistent cache, unless the user has chosen one: a sweep's runs of one shape compile once."""
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def keep_freed_memory() -> None:
    """On Linux with glibc, memory that a step has freed stays with the process for the next one. Otherwise it goes back
    to the kernel and is fetched anew, page by page: on a CPU up to half of a small model's step (DeltaNet, 20k
    parameters: 14 against 7 ms), or nothing, by the sizes of its arrays."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: the most it takes; below, arrays come from the heap
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


# Dense bf16 FLOP/s per device, from the makers' data sheets.
_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "TPU v4": 275e12, "TPU v5 lite": 197e12,
         "TPU v5p": 459e12, "TPU v6 lite": 918e12}  # fmt: skip


def peak_flops() -> float | None:
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in _PEAK.items() if name in kind), None)


def peak_memory() -> int:
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


def count_memory_anew() -> bool:
    """Gives back what was freed, and lets `peak_memory` begin again from what is left. False where it cannot: on other
    systems than Linux, and on accelerators."""
    if jax.default_backend() != "cpu":
        return False
    try:
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # no such file; another C library
        return False
    return True


@functools.cache
def versions() -> dict[str, str]:
    names = ("scalelab", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@functools.cache
def git_state() -> tuple[str | None, bool | None]:
    """Commit and dirty flag of the repository that tracks this code; failing that, of the working directory's."""

    def git(*arguments: str, folder: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    here = str(pathlib.Path(__file__).parent)
    folder = here if git("ls-files", "--error-unmatch", pathlib.Path(__file__).name, folder=here) else "."
    commit = git("rev-parse", "HEAD", folder=folder)
    status = git("status", "--porcelain", folder=folder)
    return commit, None if status is None else bool(status)


def utc() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
