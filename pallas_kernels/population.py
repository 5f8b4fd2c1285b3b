"""Kernels under `jax.vmap`: a population of runs becomes more rows of one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def folded(kernel: Callable[..., Any], shared: Sequence[int] = ()) -> Callable[..., Any]:
    """`kernel`, whose arguments and outputs (arrays, or trees of them) have the rows as first axis, for a population
    too. Arguments at the positions `shared` have a first axis that divides the rows: an entry of theirs is for all rows
    of a member, and one entry for all members stays one."""
    # A function of its own each time: JAX keeps traces by function, and whether kernels are interpreted is not in their
    # key.
    call = jax.custom_batching.custom_vmap(lambda *args: kernel(*args))

    @call.def_vmap
    def rule(size: int, batched: Any, *args: Any) -> tuple[Any, Any]:
        def rows(arg: Array, own: bool, once: bool) -> Array:
            if not own and once and arg.shape[0] == 1:
                return arg
            arg = arg if own else jnp.broadcast_to(arg, (size, *arg.shape))
            return arg.reshape(-1, *arg.shape[2:])

        folds = [
            jax.tree.map(lambda a, own, once=place in shared: rows(a, own, once), arg, its)
            for place, (arg, its) in enumerate(zip(args, batched, strict=True))
        ]
        out = jax.tree.map(lambda a: a.reshape(size, -1, *a.shape[1:]), call(*folds))
        return out, jax.tree.map(lambda _: True, out)

    return call
