"""Mixture-of-Recursions (Bae et al. 2025, arXiv 2507.10524): the same layers, Nr times, for ever fewer tokens.

Between a prefix and a suffix of layers of their own lie the layers of `model.blocks`, whose parameters all recursions
share. At recursion r the tokens that recursion r - 1 updated compete (at the first, all):

    z = theta_r . x / temperature,   g = alpha sigma(z)                      float32
    x <- x + g Block(x)  for those that are selected, with Block's own residual path in Block(x);  x  for the others

Selected tokens attend among themselves, in order, by their true positions, inside their documents. Which they are:

* In training (expert choice) the ceil(c_r T) tokens of a row of T with the largest z, c_r the capacities. They are
  gathered, so that the block runs on a shorter row. This choice looks at the future of a token, and nothing else may:
  an auxiliary loss teaches z to say it: `loss` times sum_r mean(softplus(z) - z [selected]) over those that compete.
* Everywhere else those with z > 0, which each token knows by itself: the full pass, steps and any split agree, but for
  a z so near 0 that rounding decides. The block runs on the whole row; a token that is left out belongs to no document
  that another one reads.

A recursion whose capacity is that of the one before (a first one of 1 too) has no choice to make: it takes all that
compete, in both ways, and has no loss *(choice)*. So it is a threshold that evaluates what a top-k has trained: how far
the two agree is counted (`summary`), and held-out evaluation reports the share that each recursion updates.

Caches are those of Nr separate blocks, a slot for every token, since a threshold may select them all *(choice)*: the
published (Nr + 1) / (2 Nr) of that is what linear capacities fill. Mixers with a state other than a cache of tokens
would need to skip tokens, and windows would count other tokens in training than later: both are refused. Capacities
are not warmed up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from scalelab.errors import BadInput
from scalelab.models.part import Part
from scalelab.models.spec import BlockSpec, Flops, RecursionOptions, Spec
from scalelab.parametrization import Tensor
from scalelab.schema import at_least

F32 = jnp.float32
NO_DOCUMENT = jnp.iinfo(jnp.int32).min  # segment of the tokens that a recursion leaves out
Rows = tuple[Any, Any]  # (segment ids or None, positions) of the tokens of a pass
# (x, rows, state of the layers or None) -> (y, state, aux), through the shared layers once.
Shared = Callable[[Array, Rows, Any], tuple[Array, Any, Any]]

# ------------------------------------------------------------------------------------ pure functions of the config


def check(options: RecursionOptions, blocks: tuple[BlockSpec, ...]) -> None:
    """Raises `BadInput` for options that cannot be, and for layers that cannot be shared so."""
    o, section = options, "model.recursion"
    at_least(f"{section}.count", o.count, 1)
    for name in ("alpha", "temperature"):
        at_least(f"{section}.{name}", getattr(o, name), 0, above=True)
    at_least(f"{section}.loss", o.loss, 0)
    if o.capacities:
        numbers = all(type(c) in (int, float) and 0 < c <= 1 for c in o.capacities)
        if len(o.capacities) != o.count or not numbers or list(o.capacities) != sorted(o.capacities, reverse=True):
            remedy = f"must be {o.count} shares (recursion.count) in (0, 1] that never grow; () takes linear ones"
            raise BadInput(f"config.{section}.capacities", o.capacities, remedy)
    for block in blocks if o.count > 1 else ():
        if block.mixer != "attention":
            remedy = "cannot be shared by recursions: its state would run over the tokens that they leave out; "
            raise BadInput("config.model.blocks", block.mixer, remedy + "attention can")
        if window := block.mixer_options.window:
            remedy = "must be 0 in layers that recursions share; model.prefix and model.suffix take any"
            raise BadInput("config.model.attention.window", window, remedy)


def capacities(options: RecursionOptions) -> tuple[float, ...]:
    """c_r; by default linear, (Nr - r + 1) / Nr for r = 1 .. Nr."""
    n = options.count
    return options.capacities or tuple((n - r) / n for r in range(n))


def chooses(options: RecursionOptions) -> tuple[bool, ...]:
    """Whether a recursion selects among the tokens that compete; if not, it takes them all."""
    c = (1.0, *capacities(options))
    return tuple(own < before for before, own in itertools.pairwise(c))


def kept(options: RecursionOptions, length: int) -> tuple[int, ...]:
    """Tokens of a row of `length` that each recursion takes in training, ceil(c_r T)."""
    return tuple(math.ceil(round(c * length, 6)) for c in capacities(options))  # 1/3 of 9 is 3, whatever the rounding


def applied(spec: Spec, length: int) -> Iterator[tuple[BlockSpec, int]]:
    """The layers in the order of a pass, those of the shared block once a recursion, each with the tokens of a row of
    `length` that it reads."""
    yield from ((block, length) for block in spec.prefix)
    for tokens in kept(spec.recursion, length):
        yield from ((block, tokens) for block in spec.period * spec.repeats)
    yield from ((block, length) for block in spec.suffix)


def uses(spec: Spec, part: str) -> float:
    """How often a token uses what is declared under that top-level name, on average by the capacities."""
    c = capacities(spec.recursion)
    if part == "recursion":
        return (1 + sum(c[:-1])) / len(c)  # of Nr rows
    return spec.copies(part) * (sum(c) if part == "period" else 1)


# ------------------------------------------------------------------------------------ the module


class Recursion(Part):
    router: nnx.Param

    @staticmethod
    def tensors(spec: Spec, options: None = None) -> dict[str, Tensor]:
        return {"router": Tensor((spec.recursion.count, spec.width), "gate", fan_in=spec.width)}

    @staticmethod
    def flops(spec: Spec, length: int) -> Flops:
        """Of the router, per token of a row of `length`: of its tokens those that compete have a logit."""
        competing = (length, *kept(spec.recursion, length)[:-1]) if spec.recursion.count > 1 else ()
        products = 2 * spec.width * sum(competing) / length
        return Flops(products, products)

    def __call__(
        self, x: Float[Array, "B T D"], rows: Rows, state: Any, block: Shared, *, train: bool
    ) -> tuple[Float[Array, "B T D"], Any, Any, dict[str, Array]]:
        """x -> (x after all recursions, state, aux of the shared layers with the recursions one after the other on the
        axis of repeats, aux of the router). `train`: selected as in training, which is without a state. Otherwise the
        router's aux is "selected" (B, T, Nr), 1 where a recursion updated a token (of parallel streams their mean)."""
        if train:
            x, found, seen = self._best(0, x, rows, block)
            own = {name: jnp.stack([recursion[name] for recursion in seen]) for name in seen[0]}
            own["loss"] = self.spec.recursion.loss * jnp.sum(own["bce"] / own["competing"])
            own = {name: a if name == "loss" else jax.lax.stop_gradient(a) for name, a in own.items()}
        else:
            x, state, found, own = self._above(x, rows, state, block)
        return x, state, jax.tree.map(lambda *a: jnp.concatenate(a), *found), own

    def init_state(self, batch: int, blocks: Any) -> dict[str, Any]:
        """`blocks`: the first state of the shared layers. "document": that of the last token of each row."""
        return {"document": jnp.zeros((batch,), jnp.int32), "recursions": (blocks,) * self.spec.recursion.count}

    def _logits(self, r: int, x: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        z = jnp.einsum("btd,d->bt", x.astype(F32), self.exact("router")[r], precision="highest")
        return z / self.spec.recursion.temperature

    def _updated(self, x: Float[Array, "B T D"], z: Float[Array, "B T"], y: Float[Array, "B T D"]) -> Array:
        g = self.spec.recursion.alpha * jax.nn.sigmoid(z)
        return (x.astype(F32) + g[..., None] * y.astype(F32)).astype(x.dtype)

    def _best(
        self, r: int, x: Float[Array, "B n D"], rows: Rows, block: Shared, length: int = 0
    ) -> tuple[Float[Array, "B n D"], list[Any], list[dict[str, Array]]]:
        """Recursions r, r + 1, .. on the n tokens that compete, of a row of `length` -> (x, aux of the layers in each,
        counters of each)."""
        if r == self.spec.recursion.count:
            return x, [], []
        (B, n), length = x.shape[:2], length or x.shape[1]
        z = self._logits(r, x)
        rows = (rows[0], jnp.broadcast_to(rows[1], (B, n)))
        k = kept(self.spec.recursion, length)[r]
        index = best(jax.lax.stop_gradient(z), k) if k < n else None
        # Of the tokens that are selected:
        xs, zs, rows = (x, z, rows) if index is None else jax.tree.map(lambda a: take(a, index), (x, z, rows))
        y, _, aux = block(xs, rows, None)
        xs, deeper, seen = self._best(r + 1, self._updated(xs, zs, y), rows, block, length)
        selected = jnp.ones((B, n), bool) if index is None else put(jnp.zeros((B, n), bool), index, True)
        x = xs if index is None else put(x, index, xs)
        return x, [aux, *deeper], [self._counters(r, z, selected), *seen]

    def _counters(self, r: int, z: Float[Array, "B n"], selected: Bool[Array, "B n"]) -> dict[str, Array]:
        """Over the tokens that compete: how many, and how many were selected, would be by the threshold, are the same
        in both; and the sum of the binary cross-entropy."""
        choice = chooses(self.spec.recursion)[r]
        above = z > 0 if choice else selected
        bce = jnp.sum(jax.nn.softplus(z) - z * selected) if choice else jnp.zeros((), F32)
        counted = {
            "competing": jnp.ones_like(selected),
            "selected": selected,
            "above": above,
            "same": above == selected,
        }
        return {name: jnp.sum(a, dtype=F32) for name, a in counted.items()} | {"bce": bce}

    def _above(
        self, x: Float[Array, "B T D"], rows: Rows, state: Any, block: Shared
    ) -> tuple[Float[Array, "B T D"], Any, list[Any], dict[str, Array]]:
        """All recursions on whole rows, each token by its own logits."""
        segments, positions = rows
        if segments is None:
            segments = jnp.zeros((), jnp.int32) if state is None else state["document"][:, None]
        segments = jnp.broadcast_to(segments, x.shape[:2])
        active = jnp.ones(x.shape[:2], bool)
        found, after, selected = [], [], []
        for r, choice in enumerate(chooses(self.spec.recursion)):
            z = self._logits(r, x)
            active = active & (z > 0) if choice else active
            own = jnp.where(active, segments, NO_DOCUMENT)
            y, states, aux = block(x, (own, positions), state and state["recursions"][r])
            x = jnp.where(active[..., None], self._updated(x, z, y), x)
            found, after, selected = [*found, aux], [*after, states], [*selected, active.astype(F32)]
        state = {"document": segments[:, -1], "recursions": tuple(after)}
        of_streams = jnp.stack(selected, axis=-1).reshape(-1, self.spec.streams, x.shape[1], len(selected))
        return x, state, found, {"selected": jnp.mean(of_streams, axis=1)}


def summary(options: RecursionOptions, counters: dict[str, Array]) -> dict[str, Array]:
    """What to log of a training batch, for recursions r from 1: "selected_r", the share of all tokens that was; where
    there is a choice, "threshold_r", the share of all that is in the running and has z > 0, "accuracy_r", how often
    that is as selected, and "bce_r", the auxiliary loss without its coefficient."""
    c, found = counters, {}
    for r, choice in enumerate(chooses(options)):
        found[f"selected_{r + 1}"] = c["selected"][r] / c["competing"][0]
        if choice:
            found[f"threshold_{r + 1}"] = c["above"][r] / c["competing"][0]
            found[f"accuracy_{r + 1}"] = c["same"][r] / c["competing"][r]
            found[f"bce_{r + 1}"] = c["bce"][r] / c["competing"][r]
    return found


def best(scores: Float[Array, "B n"], k: int) -> Int[Array, "B k"]:
    """Where the k largest of each row are, in order; of equal ones the first. By sorting: `lax.top_k` would fetch the
    rows of all devices."""
    return jnp.sort(jnp.argsort(-scores, axis=1, stable=True)[:, :k], axis=1)


def take(a: Array, index: Int[Array, "B k"]) -> Array:
    """Of each row the entries at `index`."""
    return jax.vmap(lambda row, i: row.at[i].get(unique_indices=True, indices_are_sorted=True))(a, index)


def put(a: Array, index: Int[Array, "B k"], values: Any) -> Array:
    """Each row with its entries at `index` replaced."""
    values = jnp.broadcast_to(values, (*index.shape, *a.shape[2:])).astype(a.dtype)
    return jax.vmap(lambda row, i, v: row.at[i].set(v, unique_indices=True, indices_are_sorted=True))(a, index, values)
