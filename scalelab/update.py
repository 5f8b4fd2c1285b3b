"""One update: the jitted step, and what a run needs on its devices to take it.

Modules describe, the hot path is plain JAX: the model is split once into a graph definition and raw arrays, and the
step maps (state, batch) to (state, metrics) and gives its old state's memory back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from scalelab import data, models, optim, parametrization, sharding, start
from scalelab.errors import BadInput
from scalelab.schema import Config


class TrainState(NamedTuple):
    params: Any  # nested dict of float32 arrays
    opt_state: Any
    step: Int[Array, ""]  # updates done


def resolve(config: Config, corpus: data.Corpus) -> Config:
    """The model section with its vocabulary filled in and checked against the tokenizer's."""
    return models.with_vocabulary(config.model, corpus.vocab_size)


def make_nll(
    config: Config, model: Config, bos: int, *, training: bool = False, mesh: Mesh | None = None
) -> Callable[[Any, Int[Array, "B T+1"]], tuple[Float[Array, "B T"], Float[Array, "B T"], Any]]:
    """(params, rows) -> negative log-likelihood in nats and log-sum-exp of the logits, per target token, and aux."""
    graphdef, _ = models.abstract(model, training=training, kernels=config.kernels, mesh=mesh, unroll=unrolled(config))

    def nll(params: Any, rows: Int[Array, "B T+1"]) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Any]:
        inputs, targets = data.split_rows(rows)
        segments = jnp.cumsum(inputs == bos, axis=1) if config.data.document_mask else None
        return models.merge(graphdef, params).nll(inputs, targets, segments)

    return nll


def scored(nats: Array, lse: Array, aux: Any) -> Any:
    """What evaluation reads of `nll`'s values: nats, and with recursions which of them updated each token."""
    return (nats, aux["recursion"]["selected"]) if "recursion" in aux else nats


def unrolled(config: Config) -> int:
    """How many repeats of the blocks the program writes out. A loop compiles them once, but stacks what the backward
    pass wants of them, copy by copy: 8 of 67 ms of a step of 136 million parameters on an H100."""
    return config.unroll or (10**6 if jax.default_backend() == "gpu" else 1)


def make_step(
    config: Config,
    model: Config,
    nll: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    trained: Any = None,
) -> Callable[[TrainState, Int[Array, "B T+1"], Any], tuple[TrainState, dict[str, Any]]]:
    """(state, rows, learning rate) -> (state, metrics): one update on a global batch. Not jitted yet.

    The batch is cut into `accum_steps` parts. Loss and gradient are sums over all scored targets divided by their
    number in the whole batch, whatever the parts; a loss on how the whole batch was routed needs a pass before that
    counts. With `trained`, a tree of bool, only those tensors have gradients, optimizer state and updates.
    """
    parts, z_loss = config.train.accum_steps, config.train.z_loss

    def objective(
        own: Any, params: Any, rows: Int[Array, "b T+1"], tokens: Array, whole: Any = None
    ) -> tuple[Array, tuple[Array, Any]]:
        losses, lse, aux = nll(start.put(params, own), rows)
        loss, blocks = jnp.sum(losses), aux["loss"]
        if whole is not None:
            blocks += models.counters.rest_of_loss(model, aux, whole)
        # The blocks' own losses are means over what is read, and all parts read alike; here everything is a sum.
        total = loss + z_loss * jnp.sum(lse**2) + blocks * (tokens / parts)
        return total, (loss, models.counters.counters(aux))

    gradient = jax.grad(objective, has_aux=True)

    def total(f: Callable[[Array], Any], cut: Array) -> Any:
        """The sum of f over the parts."""
        zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(f, cut[0]))
        return jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, f(part)), None), zero, cut)[0]

    def step(state: TrainState, rows: Int[Array, "B T+1"], rate: Any) -> tuple[TrainState, dict[str, Any]]:
        own = start.part(state.params, trained)
        tokens = jnp.sum(data.split_rows(rows)[1] >= 0)
        if parts == 1:
            grads, (loss, counted) = gradient(own, state.params, rows, tokens)
        else:
            # Every device cuts its own rows, so that no row moves.
            cut = rows.reshape(-1, parts, rows.shape[1]).swapaxes(0, 1)
            whole = None
            if models.counters.joint(model):
                whole = total(lambda part: models.counters.counters(nll(state.params, part)[2]), cut)
            grads, (loss, counted) = total(lambda part: gradient(own, state.params, part, tokens, whole), cut)
        grads = jax.tree.map(lambda g: g / tokens, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, own)
        own = jax.tree.map(lambda p, u: p - rate * u, own, updates)
        params = start.put(state.params, own)
        if trained is None:  # a frozen router keeps its selection bias
            params = models.counters.after_step(model, params, counted)
        metrics = {"loss": loss / tokens, "grad_norm": optax.tree.norm(grads)}
        metrics |= models.counters.summary(model, counted)
        return TrainState(params, opt_state, state.step + 1), metrics

    return step


class Trainer:
    """What a run needs on the device: its mesh, its initial state, its compiled step and evaluation."""

    def __init__(self, config: Config, corpus: data.Corpus):
        self.model = resolve(config, corpus)
        self.mesh = sharding.mesh(config)
        self.config = config
        _, shapes = models.abstract(self.model)
        self.trained = start.trained(config, self.model)
        mask = parametrization.decay_mask(models.roles(self.model), config.optim.decay_embeddings)
        rules = models.rules(self.model, config.optim.decay_exponent)
        rules = rules and start.part(rules, self.trained)
        self.optimizer = optim.optimizer(config.optim, start.part(mask, self.trained), rules)
        nll, training_nll = (
            make_nll(config, self.model, corpus.bos, training=training, mesh=self.mesh) for training in (False, True)
        )
        everywhere = sharding.replicated(self.mesh)
        step = make_step(config, self.model, training_nll, self.optimizer, self.trained)
        self.step = jax.jit(step, donate_argnums=0)
        self.nll = jax.jit(lambda params, rows: scored(*nll(params, rows)), out_shardings=everywhere)
        self._init = jax.jit(self._initial, out_shardings=everywhere)
        self.abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), jax.eval_shape(self._initial, 0)
        )
        assert jax.tree.structure(shapes) == jax.tree.structure(self.abstract.params)
        if config.kernels not in ("auto", "xla", "reference"):  # may refuse the model's shapes: before anything is run
            rows = jax.ShapeDtypeStruct((config.data.batch_size, config.data.seq_len + 1), jnp.int32)
            try:
                jax.eval_shape(training_nll, shapes, rows)
            except dispatch.Unsupported as refused:
                raise BadInput("config.kernels", config.kernels, str(refused)) from None

    def _initial(self, seed: Any) -> TrainState:
        params = models.init(self.model, jax.random.key(seed))
        opt_state = self.optimizer.init(start.part(params, self.trained))
        return TrainState(params, opt_state, jnp.zeros((), jnp.int32))

    def initial_state(self) -> TrainState:
        state = self._init(np.uint32(self.config.seed))
        if not self.config.start.path:
            return state
        return state._replace(params=start.overlay(state.params, self.config.start.path))
