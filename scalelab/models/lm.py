"""The language model: embedding, a scanned stack of blocks, head, loss; and its functional face over raw arrays.

Floating point: parameters are float32; they are cast to `compute_dtype` where they are used, and the residual stream
is in it. Norm statistics, softmax, rotary angles, logits and the loss are float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from pallas_kernels.cross_entropy import cross_entropy
from scalelab.errors import BadInput
from scalelab.models.block import Block
from scalelab.models.layers import Norm, scaled, soft_cap
from scalelab.models.parscale import Aggregator, spread
from scalelab.models.recursion import Recursion, Rows
from scalelab.models.registry import resolve
from scalelab.models.spec import BlockSpec, Spec
from scalelab.parametrization import Rule, Source, Tensor, rule, with_base

PARTS = ("prefix", "period", "suffix")  # of the stack
APART = 2**20  # bytes of a layer's gradient that is written to its place by itself
Params = dict[str, Any]  # nested, of raw arrays; the repeated period's have a leading axis, one entry a repeat


class LanguageModel(nnx.Module):
    embed: nnx.Param
    unembed: nnx.Param
    positions: nnx.Param

    def __init__(self, spec: Spec, draw: Source):
        self.spec = spec
        for name, tensor in _outer_tensors(spec).items():
            setattr(self, name, nnx.Param(draw(tensor)))
        if spec.embed_norm:
            self.embed_norm = Norm(spec, None, draw)
        self.prefix = _blocks(spec, spec.prefix, draw)
        self.period = _blocks(spec, spec.period, draw, (spec.repeats,))
        self.suffix = _blocks(spec, spec.suffix, draw)
        if spec.placement != "post":
            self.final_norm = Norm(spec, None, draw)
        if spec.streams > 1:
            self.aggregator = Aggregator(spec, None, draw)
        if spec.recursion.count > 1:
            self.recursion = Recursion(spec, None, draw)

    @staticmethod
    def tensors(spec: Spec) -> dict[str, Any]:
        """The tree of the parameters as declared, those of the period once (without the axis of repeats)."""
        tree: dict[str, Any] = dict(_outer_tensors(spec))
        if spec.embed_norm:
            tree["embed_norm"] = Norm.declared(spec, None)
        for name in PARTS:
            if blocks := getattr(spec, name):
                tree[name] = {str(i): Block.tensors(spec, block) for i, block in enumerate(blocks)}
        if spec.placement != "post":
            tree["final_norm"] = Norm.declared(spec, None)
        if spec.streams > 1:
            tree["aggregator"] = Aggregator.declared(spec, None)
        if spec.recursion.count > 1:
            tree["recursion"] = Recursion.declared(spec, None)
        return tree

    # -------------------------------------------------------------------------------- whole sequences

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "#B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the next token, float32. Positions default to 0 .. T-1; tokens of different segments do not see
        each other. Learned positions, like rotary ones, count from the start of the row."""
        return self._logits(self.hidden(tokens, segment_ids, positions)[0])

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "#B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """What the head reads, and aux: {"loss": sum of the auxiliary losses, to be added to the training loss;
        "prefix" | "period" | "suffix": {block: {"mixer" | "channel": its values}}, "recursion": its values, where there
        are any}."""
        if positions is None:
            self._check_length(tokens.shape[1])
            positions = jnp.arange(tokens.shape[1])[None]
        x = self._embed(tokens, positions)
        rows = spread(segment_ids, self.spec.streams), self._rows(positions)
        x, _, aux = self._stack(x, rows, None, whole, train=self.spec.training)
        return self._final(x), aux

    def nll(
        self,
        inputs: Int[Array, "B T"],
        targets: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "#B T"] | None = None,
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"], dict[str, Any]]:
        """(negative log-likelihood of each target in nats, logsumexp of its logits, aux of `hidden`).

        Targets below 0 are left out: their nll and lse are 0 and have no gradient. Never holds the logits of more
        than `loss_chunk` tokens. z-loss is a mean of lse**2 over the kept tokens.
        """
        x, aux = self.hidden(inputs, segment_ids, positions)
        nll, lse = cross_entropy(
            x.reshape(-1, x.shape[-1]),
            self._head(),
            targets.reshape(-1),
            cap=self.spec.logit_cap,
            chunk=self.spec.loss_chunk,
            kernels=self.spec.kernels,
        )
        return nll.reshape(targets.shape), lse.reshape(targets.shape), aux

    def activations(
        self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
    ) -> dict[str, Float[Array, "..."]]:
        """What a coordinate check looks at, float32: "embedding" (B, T, D), "blocks" (L, B, T, D), the residual stream
        after every block in order, and "logits". Recursions select as they do outside of training, and their last
        block shows what they make of the stream, not its own output, of which a share is added."""
        positions = jnp.arange(tokens.shape[1])[None]
        embedding = x = self._embed(tokens, positions)
        rows = spread(segment_ids, self.spec.streams), self._rows(positions)

        def look(block: Block, x: Array, rows: Rows, state: Any) -> tuple[Array, None, dict[str, Array]]:
            y = block(x, *rows)[0]
            return y, None, {"input": x, "output": y}

        x, _, seen = self._stack(x, rows, None, look)
        layers: list[Any] = []
        for part in PARTS:
            outputs = [block["output"] for block in seen.get(part, {}).values()]
            # Of the period (block, repeat, ...): in the order of the stack, a repeat after the other.
            layers += [a for repeat in zip(*outputs, strict=True) for a in repeat] if part == "period" else outputs
            if part == "period" and self.spec.recursion.count > 1:
                layers[-1] = seen["suffix"]["0"]["input"] if self.spec.suffix else x
        return {
            "embedding": embedding.astype(jnp.float32),
            "blocks": jnp.stack(layers).astype(jnp.float32),
            "logits": self._logits(self._final(x)),
        }

    # -------------------------------------------------------------------------------- token by token

    def init_state(self, batch: int, max_len: int) -> dict[str, Any]:
        """What decoding carries: {"length": tokens seen, "prefix" | "period" | "suffix": {block: its state}}, with
        recursions under "period" what `Recursion.init_state` says."""

        self._check_length(max_len)

        def states(blocks: Any, lead: tuple[int, ...]) -> dict[str, Any]:
            one = {name: block.init_state(batch * self.spec.streams, max_len) for name, block in blocks.items()}
            return jax.tree.map(lambda a: jnp.broadcast_to(a, (*lead, *a.shape)), one)

        period = states(self.period, (self.spec.repeats,))
        if self.spec.recursion.count > 1:
            period = self.recursion.init_state(batch * self.spec.streams, period)
        return {
            "length": jnp.zeros((), jnp.int32),
            "prefix": states(self.prefix, ()),
            "period": period,
            "suffix": states(self.suffix, ()),
        }

    def step(self, tokens: Int[Array, " B"], state: dict[str, Any]) -> tuple[Float[Array, "B V"], dict[str, Any]]:
        """One more token -> (logits of the one after it, state). Equals the same row of `__call__`."""
        if self.spec.recursion.count > 1:  # its blocks must be told which tokens they see
            logits, state = self.extend(tokens[:, None], state)
            return logits[:, 0], state
        x = self._embed(tokens, state["length"])
        x, after, _ = self._stack(x, (None, None), state, lambda block, x, _, state: (*block.step(x, state), {}))
        return self._logits(self._final(x)), after | {"length": state["length"] + 1}

    def extend(
        self, tokens: Int[Array, "B T"], state: dict[str, Any], segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T V"], dict[str, Any]]:
        """Many more tokens at once, such as a prompt -> (their logits, state)."""
        positions = state["length"] + jnp.arange(tokens.shape[1])[None]
        rows = spread(segment_ids, self.spec.streams), positions
        x, after, _ = self._stack(self._embed(tokens, positions), rows, state, whole)
        return self._logits(self._final(x)), after | {"length": state["length"] + tokens.shape[1]}

    # -------------------------------------------------------------------------------- pieces

    def _embed(self, tokens: Int[Array, "*b"], positions: Int[Array, "*#b"]) -> Float[Array, "*b D"]:
        x = self.embed[...][tokens]
        if self.spec.positions:
            x = x + self.positions[...][positions]
        x = scaled(x, self.spec.embed_multiplier).astype(self.spec.dtype)
        x = self.embed_norm(x) if self.spec.embed_norm else x
        return x if self.spec.streams == 1 else jnp.repeat(x, self.spec.streams, axis=0)

    def _rows(self, positions: Int[Array, "#B T"]) -> Int[Array, "#B T"]:
        """Positions of every stream; one row stands for all."""
        return positions if positions.shape[0] == 1 else jnp.repeat(positions, self.spec.streams, axis=0)

    def _check_length(self, length: int) -> None:
        if 0 < self.spec.positions < length:
            raise BadInput("config.model.positions", self.spec.positions, f"is too few for {length} tokens in a row")

    def _final(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        """Normed, the streams of ParScale mixed into one, and times what multiplies the logits."""
        x = x if self.spec.placement == "post" else self.final_norm(x)
        x = x if self.spec.streams == 1 else self.aggregator(x)
        return scaled(x, self.spec.logits_multiplier)

    def _head(self) -> Float[Array, "D V"]:
        return self.embed[...].T if self.spec.tied_embeddings else self.unembed[...]

    def _logits(self, x: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        head = self._head().astype(x.dtype)
        return soft_cap(jnp.einsum("...d,dv->...v", x, head, preferred_element_type=jnp.float32), self.spec.logit_cap)

    def _stack(
        self,
        x: Array,
        rows: Rows,
        state: dict[str, Any] | None,
        apply: Callable[[Block, Array, Rows, Any], tuple[Array, Any, Any]],
        *,
        train: bool = False,
    ) -> tuple[Array, dict[str, Any], dict[str, Any]]:
        """Runs the blocks: `apply(block, x, rows, block's state) -> (x, state, aux)`. The period is a scan over its
        repeats, so that the program stays as small as one period; recursions are written out."""

        def run(graphdef: Any, rows: Rows, x: Array, xs: tuple[Any, Any]) -> tuple[Array, tuple[Any, Any]]:
            params, states = xs
            after, aux = {}, {}
            for name, block in nnx.merge(graphdef, params).items():
                x, after[name], block_aux = apply(block, x, rows, states and states[name])
                if block_aux:
                    aux[name] = block_aux
            return x, (after, aux)

        def cast(tensor: Tensor, a: Array) -> Array:
            return _cast(self.spec.dtype, a) if tensor.role == "hidden" and not tensor.exact else a

        def through(part: str, x: Array, rows: Rows, states: Any) -> tuple[Array, Any, Any]:
            graphdef, params = split(getattr(self, part))
            repeated = part == "period"
            if repeated and self.spec.training and self.spec.dtype != jnp.float32:
                params = jax.tree.map(cast, LanguageModel.tensors(self.spec)[part], params)
            loop = repeated and self.spec.unroll < self.spec.repeats
            body, xs = _remat(partial(run, graphdef, rows), self.spec.remat, loop), (params, states)
            if loop:
                x, (after, aux) = jax.lax.scan(body, x, xs, unroll=self.spec.unroll)
            else:
                x, (after, aux) = _written_out(body, x, xs) if repeated else body(x, xs)
            return x, after, aux

        after, aux = {}, {}
        for part in PARTS:
            states = state and state[part]
            if part == "period" and self.spec.recursion.count > 1:
                found = self.recursion(x, rows, states, partial(through, part), train=train)
                x, after[part], aux[part], aux["recursion"] = found
            else:
                x, after[part], aux[part] = through(part, x, rows, states)
        aux = {part: values for part, values in aux.items() if values}
        return x, after, {"loss": _sum_of_losses(aux), **aux}


def whole(block: Block, x: Array, rows: Rows, state: Any) -> tuple[Array, Any, Any]:
    """A block on many tokens at once."""
    return block(x, *rows, state)


def _outer_tensors(spec: Spec) -> dict[str, Tensor]:
    V, D = spec.vocab_size, spec.width
    tensors = {"embed": Tensor((V, D), "embedding", fan_in=D)}
    if not spec.tied_embeddings:
        tensors["unembed"] = Tensor((D, V), "unembedding", fan_in=D)
    if spec.positions:
        tensors["positions"] = Tensor((spec.positions, D), "embedding", fan_in=D)
    return tensors if spec.base is None else with_base(tensors, _outer_tensors(spec.base))


def _blocks(spec: Spec, blocks: tuple[BlockSpec, ...], draw: Source, lead: tuple[int, ...] = ()) -> Any:
    return nnx.Dict({str(i): Block(spec, block, draw, lead) for i, block in enumerate(blocks)})


def _remat(body: Callable[..., Any], policy: str, loop: bool) -> Callable[..., Any]:
    """none: keep all that the backward pass wants; dots: matrix products of weights; full: only the blocks' inputs."""
    if policy == "none":
        return body
    saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "dots" else None
    return jax.checkpoint(body, policy=saved, prevent_cse=not loop)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cast(dtype: Any, a: Array) -> Array:
    """A matrix of all repeats in the compute dtype before it is cut into layers: their gradients are then put together
    in that dtype, and once, where each pass of the optimiser would do it again."""
    return a.astype(dtype)


_cast.defvjp(
    lambda dtype, a: (_cast(dtype, a), None),
    lambda dtype, _, d: (jax.lax.optimization_barrier(d).astype(jnp.float32),),
)


def _written_out(body: Callable[..., Any], x: Array, xs: Any) -> tuple[Array, Any]:
    """What `jax.lax.scan` gives, without a loop, which would put the layers' gradients together by one pass over all
    of them: a third of the memory's rate."""
    body = jax.jit(body, inline=True)  # traced once for all layers
    leaves, tree = jax.tree.flatten(xs)
    found = []
    for layer in zip(*map(cut, leaves), strict=True):
        x, ys = body(x, jax.tree.unflatten(tree, layer))
        found.append(ys)
    return x, jax.tree.map(lambda *each: jnp.stack(each), *found)


@jax.custom_vjp
def cut(a: Array) -> list[Array]:
    """The layers of a stacked array. Their gradients are written each to its place; small ones are stacked in one pass,
    since every pass costs a microsecond or two."""
    return list(a)


def _cut_backward(_: None, d: list[Array]) -> tuple[Array]:
    if d[0].nbytes < APART:
        return (jnp.stack(d),)
    whole = jnp.zeros((len(d), *d[0].shape), d[0].dtype)
    for i, layer in enumerate(d):
        whole = jax.lax.dynamic_update_index_in_dim(whole, layer, i, axis=0)
    return (whole,)


cut.defvjp(lambda a: (cut(a), None), _cut_backward)


def _sum_of_losses(aux: dict[str, Any]) -> Float[Array, ""]:
    leaves = jax.tree_util.tree_leaves_with_path(aux)
    losses = [jnp.sum(leaf) for path, leaf in leaves if path[-1] == jax.tree_util.DictKey("loss")]
    return sum(losses, start=jnp.zeros((), jnp.float32))


# ------------------------------------------------------------------------------------ the functional face


def build(config: Any, rngs: nnx.Rngs, **way: Any) -> LanguageModel:
    """The model of a config (its `model` section, vocabulary known), parameters drawn. Raises `BadInput`.

    `way`: how its passes run, none of which changes the parameters. `training`: as in training, where that makes a
    difference (experts with a capacity). `kernels`: which implementations, as in `pallas_kernels.dispatch`. `mesh`: of
    the devices that share a batch, neighbouring rows each: the compiler cannot split kernels, and what sorts tokens it
    would move. `unroll`: repeats of the period that the program writes out one by one; the rest is a loop.
    """
    spec = dataclasses.replace(resolve(config), **way)
    tensors = jax.tree_util.tree_leaves_with_path(LanguageModel.tensors(spec))
    matrices = [t.size * spec.copies(path[0].key) for path, t in tensors if t.random]
    return LanguageModel(spec, spec.init.source(rngs.params(), sum(matrices)))


def split(model: LanguageModel) -> tuple[nnx.GraphDef, Params]:
    """(what the model is, its parameters as a plain nested dict of arrays)."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: nnx.GraphDef, params: Params) -> LanguageModel:
    return nnx.merge(graphdef, params)


def init(config: Any, key: jax.Array) -> Params:
    """Parameters drawn from a key; can be jitted with the config closed over."""
    return split(build(config, nnx.Rngs(key)))[1]


def abstract(config: Any, **way: Any) -> tuple[nnx.GraphDef, Params]:
    """`split(build(...))` with shapes in place of arrays; computes nothing."""
    return split(nnx.eval_shape(lambda: build(config, nnx.Rngs(0), **way)))


def logits(config: Any, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """float32. Raises `BadInput` for what are no rows of tokens of the vocabulary."""
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise BadInput("tokens", f"{tokens.dtype}{list(tokens.shape)}", "must be whole numbers in rows (B, T)")
    if not isinstance(tokens, Tracer) and tokens.size:  # the embedding would read others without a word
        values = np.asarray(tokens)  # under a jit that closes over them, JAX would give tracers
        for extreme in (int(values.min()), int(values.max())):
            if not 0 <= extreme < config.vocab_size:
                raise BadInput("tokens", extreme, f"must be from 0 to {config.vocab_size - 1}")
    return merge(abstract(config)[0], params)(tokens)


def tensors(config: Any) -> Params:
    """What every parameter is (`parametrization.Tensor`), in a tree like theirs."""
    return LanguageModel.tensors(resolve(config))


def roles(config: Any) -> Params:
    """The role of every parameter (`parametrization.ROLES`), in a tree like theirs."""
    return jax.tree.map(lambda tensor: tensor.role, tensors(config))


def rules(config: Any, decay_exponent: float = 1.0) -> Params | None:
    """What the optimiser multiplies of each parameter (`parametrization.Rule`), in a tree like theirs; None under the
    standard parametrisation, where every factor is 1."""
    spec = resolve(config)
    if spec.base is None:
        return None

    def of(path: Any, tensor: Tensor) -> Rule:
        return rule(tensor, spec.width_ratio, spec.depth_ratio, path[0].key in PARTS, decay_exponent)

    return jax.tree_util.tree_map_with_path(of, LanguageModel.tensors(spec))
