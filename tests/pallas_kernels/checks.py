"""What the tests of several kernels do: interpret against a definition, over a population, lower for CUDA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch

GATES = {"mild": (-0.3, 0.0), "closed": (-60.0, -20.0), "open": (-1e-6, 0.0), "mixed": (-40.0, 0.0)}


def values_and_gradients(f: Callable[..., Any], arrays: Sequence[Any], cotangents: Any) -> tuple[Any, ...]:
    out, pull = jax.vjp(f, *arrays)
    return *out, *pull(cotangents)


def cotangents_of(v: Any, state: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    """Of outputs like v, and of the state after them."""
    return tuple(jnp.asarray(rng.normal(size=a.shape), a.dtype) for a in (v, state))


def errors(kernel: Any, definition: Any, arrays: Sequence[Any], cotangents: Any) -> list[float]:
    """||got - want|| / ||want|| of the outputs and all gradients, interpreted, the definition's in float32. The outputs
    are like `cotangents`."""
    with dispatch.interpreted():
        got = jax.jit(lambda *a: values_and_gradients(kernel, a, cotangents))(*arrays)
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), (tuple(arrays), cotangents))
    want = jax.jit(lambda a, c: values_and_gradients(definition, a, c))(*exact)
    for a, like in zip(got, (*cotangents, *arrays), strict=True):
        assert (a.shape, a.dtype) == (like.shape, like.dtype)
    gaps = [(jnp.linalg.norm(a.astype(jnp.float32) - b), jnp.linalg.norm(b)) for a, b in zip(got, want, strict=True)]
    return [float(gap) / max(float(norm), 1e-4) for gap, norm in gaps]


def population_equals_members(kernel: Any, members: Sequence[tuple[Any, Any]], shared: Sequence[int]) -> None:
    """`members`: (arrays, cotangents) of each; arrays at positions `shared` are the first's, the same for all."""
    first = members[0][0]
    arrays = [a if i in shared else jnp.stack([m[0][i] for m in members]) for i, a in enumerate(first)]
    cotangents = jax.tree.map(lambda *c: jnp.stack(c), *(m[1] for m in members))
    axes = [None if i in shared else 0 for i in range(len(first))]

    @jax.jit
    def run(cotangents: Any, *arrays: Any) -> Any:
        return values_and_gradients(kernel, arrays, cotangents)

    with dispatch.interpreted():
        together = jax.vmap(run, in_axes=(0, *axes))(cotangents, *arrays)
        for m, (own, d) in enumerate(members):
            alone = run(d, *(first[i] if i in shared else a for i, a in enumerate(own)))
            for a, b in zip(together, alone, strict=True):
                a, b = (np.asarray(x, np.float32) for x in (a[m], b))
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def custom_calls(run: Callable[..., Any], args: Sequence[Any]) -> tuple[int, int]:
    """How many Mosaic GPU kernels are in (out, final) = run(*args) for CUDA; and in its gradient under remat."""

    def loss(*a: Any) -> Any:
        out, final = run(*a)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(final)

    def count(f: Callable[..., Any]) -> int:
        lowered = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",))
        return lowered.as_text().count("custom_call @mosaic_gpu")

    exact = [i for i, a in enumerate(args) if jnp.issubdtype(a.dtype, jnp.floating)]
    return count(loss), count(jax.grad(jax.checkpoint(loss), argnums=exact))
