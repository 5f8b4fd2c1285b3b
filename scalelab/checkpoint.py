"""Checkpoints: Orbax, asynchronous, with checksums of our own.

A checkpoint has three items: `params`, `rest` (optimizer state and step) and `meta` (JSON with the checksums). A
finished run keeps `params` and `meta` of its last step. The step is the data position; there is no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from scalelab.errors import BadInput

SCHEMA = 1
_UINT = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


@jax.jit
def _checksums(tree: Any) -> list[jax.Array]:
    """Two weighted sums of every array's bits, modulo 2^32.

    Integer addition is exact in any order, so a sharded array needs no gathering. The weights are odd, hence
    invertible modulo 2^32: no change of a single element can leave a sum as it was.
    """

    def one(x: jax.Array) -> jax.Array:
        x = jnp.asarray(x)
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        bits = jax.lax.bitcast_convert_type(x, _UINT[x.dtype.itemsize]).astype(jnp.uint32).reshape(-1)
        place = jnp.arange(bits.size, dtype=jnp.uint32)
        weights = (place * jnp.uint32(2) + jnp.uint32(1), (place * jnp.uint32(0x9E3779B9)) | jnp.uint32(1))
        return jnp.stack([jnp.sum(bits * weight, dtype=jnp.uint32) for weight in weights])

    return [one(x) for x in jax.tree.leaves(tree)]


def checksums(tree: Any) -> dict[str, list[int]]:
    """Path of every array -> its checksum."""
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return dict(zip(names, ([int(v) for v in s] for s in jax.device_get(_checksums(tree))), strict=True))


def _shapes(tree: Any) -> dict[str, list[int]]:
    """Path of every array -> its shape."""
    return {jax.tree_util.keystr(path): list(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


class Damaged(Exception):
    """A checkpoint that does not hold what was saved."""


class Checkpoints:
    """The checkpoints of one run. `params` and `rest` are pytrees of arrays; `rest` may be left out (final weights)."""

    def __init__(self, folder: pathlib.Path, keep_last: int = 2, keep_at: Sequence[int] = ()):
        self.keep_last, self.keep_at = keep_last, frozenset(keep_at)
        self.damaged: set[int] = set()
        self.newer = False  # whether one was saved since the folder was opened
        options = ocp.CheckpointManagerOptions(create=True, cleanup_tmp_directories=True)
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, params: Any, rest: Any | None, meta: dict[str, Any]) -> None:
        """Starts saving; the arrays may be overwritten as soon as this returns. An older save's failure raises here."""
        self.wait()
        if step in self.damaged:
            self._delete(step)
        items: dict[str, Any] = {"params": ocp.args.StandardSave(params)}
        sums = {"params": checksums(params)}
        if rest is not None:
            items["rest"] = ocp.args.StandardSave(rest)
            sums["rest"] = checksums(rest)
        shapes = {item: _shapes(tree) for item, tree in (("params", params), ("rest", rest)) if item in sums}
        document = {"schema": SCHEMA, "step": step, "checksums": sums, "shapes": shapes, **meta}
        self.manager.save(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(document)), force=True)
        self.newer = True

    def _delete(self, step: int) -> None:
        self.manager.delete(step)
        self.damaged.discard(step)

    def wait(self) -> None:
        """Until what was saved is committed. Only then do those before it go that are not to be kept, and damaged ones:
        nothing is deleted for a checkpoint that may still fail."""
        self.manager.wait_until_finished()
        if not self.newer:
            return
        passing = [s for s in sorted(self.manager.all_steps()) if s not in self.keep_at | self.damaged]
        for step in [*passing[: -self.keep_last], *self.damaged]:
            self._delete(step)

    def clear(self) -> None:
        """Deletes all of them."""
        for step in self.manager.all_steps():
            self._delete(step)

    def keep_only(self, step: int | None) -> None:
        """Once the run is finished: drops what is neither the given step nor named in `keep_at`."""
        self.wait()
        for other in self.manager.all_steps():
            if other != step and other not in self.keep_at:
                self._delete(other)

    def restore(
        self, params: Any, rest: Any, say: Callable[[str], None]
    ) -> tuple[int, Any, Any | None, dict[str, Any]] | None:
        """The newest sound checkpoint: (step, params, rest or None for final weights, meta); None if there is none.

        `params` and `rest` are trees of ShapeDtypeStruct with shardings. A damaged checkpoint is passed over, aloud; it
        goes when a later one is committed. Raises `BadInput` for one that holds other arrays than these; what says
        nothing of the files, as a lack of memory, goes through.
        """
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                return self._restore(step, params, rest)
            except (BadInput, MemoryError, jax.errors.JaxRuntimeError):
                raise
            except Exception as error:  # anything may come out of damaged files
                _forget_abandoned_reads()
                reason = " ".join(str(error).split()) or type(error).__name__
                say(f"checkpoint of step {step} is damaged ({reason[:160]}); falling back to the one before")
                self.damaged.add(step)
        return None

    def _restore(self, step: int, params: Any, rest: Any) -> tuple[int, Any, Any | None, dict[str, Any]]:
        meta = self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        sums = meta["checksums"]
        wanted = {"params": params} | ({"rest": rest} if "rest" in sums else {})
        for item, shapes in meta.get("shapes", {}).items():
            if shapes != (ours := _shapes(wanted[item])):
                name = next(name for name in (*shapes, *ours) if shapes.get(name) != ours.get(name))
                remedy = (
                    f"holds {item}{name} of shape {shapes.get(name)}, where this version has {ours.get(name)}: take "
                    "the version that wrote it, or delete the run's folder to train it anew"
                )
                raise BadInput("checkpoint", str(self.manager.directory / str(step)), remedy)
        items = {item: ocp.args.StandardRestore(tree) for item, tree in wanted.items()}
        restored = self.manager.restore(step, args=ocp.args.Composite(**items))
        for item, expected in sums.items():
            found = checksums(restored[item])
            wrong = [name for name in expected if found.get(name) != expected[name]]
            if wrong or len(found) != len(expected):
                raise Damaged(f"checksum of {item}{wrong[0] if wrong else ''} differs")
        if meta["step"] != step:
            raise Damaged(f"says it is of step {meta['step']}")
        return step, restored["params"], restored.get("rest"), meta

    def close(self) -> None:
        self.manager.close()


def load_params(folder: pathlib.Path, params: Any = None, say: Callable[[str], None] = print) -> tuple[int, Any] | None:
    """(step, parameters) of the newest sound checkpoint below a run's folder, for evaluation and sampling.

    `params` is their tree of ShapeDtypeStruct with shardings; without it the checkpoint's own shapes are taken, on the
    first device. Reads only: unlike `Checkpoints.restore` it deletes nothing. Says what it finds damaged.
    """
    if not (folder / "checkpoints").is_dir():
        return None
    with _without_warnings(), ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                wanted = _saved_shapes(manager.directory / str(step)) if params is None else params
                items = ocp.args.Composite(params=ocp.args.StandardRestore(wanted), meta=ocp.args.JsonRestore())
                restored = manager.restore(step, args=items)
                if checksums(restored.params) != restored.meta["checksums"]["params"]:
                    raise Damaged("checksum of the parameters differs")
                return step, restored.params
            except Exception as error:
                _forget_abandoned_reads()
                say(f"checkpoint of step {step} is damaged ({type(error).__name__}); trying the one before")
    return None


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Nothing of what Orbax logs where a checkpoint is damaged, or was left without a metadata file of its own."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@functools.cache
def _forget_abandoned_reads() -> None:
    """From here on neither Python nor asyncio reports coroutines that nobody waited for. Where one array of a
    checkpoint is damaged Orbax leaves the reads of the others so: hundreds of lines, at any time later.
    (What its threads in C++ print themselves, a few lines now and then, is beyond reach.)"""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    report = sys.unraisablehook

    def others(found: Any) -> None:
        if not asyncio.iscoroutine(found.object) and str(found.exc_value) != "Event loop is closed":
            report(found)

    sys.unraisablehook = others


def _saved_shapes(folder: Any) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    saved = ocp.StandardCheckpointer().metadata(folder / "params").item_metadata
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), saved)
