"""Kernels under `jax.vmap`: a population of runs becomes more rows of one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def folded(kernel: Callable[..., Any], shared: Sequence[int] = ()) -> Callable[..., Any]:
    """`kernel`, whose arguments and outputs (a list) are arrays with the rows as first axis, for a population too.
    Arguments at the positions `shared` have a first axis that divides the rows: an entry of theirs is for all rows of a
    member, and one entry for all members stays one."""
    # A function of its own each time: JAX keeps traces by function, and whether kernels are interpreted is not in their
    # key.
    call = jax.custom_batching.custom_vmap(lambda *args: kernel(*args))

    @call.def_vmap
    def rule(size: int, batched: Any, *args: Array) -> tuple[Any, Any]:
        rows = []
        for place, (arg, own) in enumerate(zip(args, batched, strict=True)):
            if own or place not in shared or arg.shape[0] != 1:
                arg = arg if own else jnp.broadcast_to(arg, (size, *arg.shape))
                arg = arg.reshape(-1, *arg.shape[2:])
            rows.append(arg)
        out = [a.reshape(size, -1, *a.shape[1:]) for a in call(*rows)]
        return out, [True] * len(out)

    return call
