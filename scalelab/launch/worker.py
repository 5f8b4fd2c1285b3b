"""A worker: one process that trains run after run, as a sweep names them, so that imports are paid for once."""

from __future__ import annotations

import gc
import json
import os
import pathlib
import sys
from collections.abc import Iterable

import jax

from scalelab import host, train
from scalelab.config import RunSpec


def serve(folders: Iterable[str]) -> None:
    """Trains the run of every folder, a line of JSON each, with all it prints in the folder's log.txt.

    A run that fails ends the worker, and the next has a fresh one. So has every run where its peak of memory could not
    be told from that of the run before.
    """
    for line in folders:
        folder = pathlib.Path(json.loads(line))
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log, stream.fileno())
        os.close(log)
        train.run(RunSpec.load(folder / "spec.json"), folder.parent)
        jax.clear_caches()
        gc.collect()
        if not host.count_memory_anew():
            return
