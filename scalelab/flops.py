"""Parameters, FLOPs and memory of a model, from its config alone: the sum of what its parts report of themselves.

Convention: a product with a matrix a -> b costs 2ab per token; biases, norms, activations, rotary embedding, softmax,
residual additions and the embedding lookup cost nothing; causal attention is counted as causal; the backward pass costs
twice the forward one; recomputation is not model FLOPs. The compute of a run is its training FLOPs per token times its
tokens, not 6ND, which is kept beside it for comparison with papers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from scalelab.models.block import Block
from scalelab.models.lm import LanguageModel
from scalelab.models.parscale import Aggregator
from scalelab.models.recursion import Recursion, applied, uses
from scalelab.models.registry import resolve
from scalelab.models.spec import Flops
from scalelab.parametrization import Tensor


@dataclasses.dataclass(frozen=True)
class PerToken:
    """FLOPs per token at a sequence length. `matmul_forward`: the matrix products of the forward pass as the plain XLA
    form runs them, attention as the full square; what `jaxpr_matmul_flops` finds. Both are of training where recursions
    leave tokens out: other passes cost as many by the share that the threshold selects, but run every recursion on all
    tokens."""

    forward: float
    forward_without_unembedding: float
    matmul_forward: float

    @property
    def training(self) -> float:
        return 3 * self.forward


@dataclasses.dataclass(frozen=True)
class Counts:
    """Parameters: all; those that one token uses; of the embedding, learned positions included; of the unembedding
    (0 where tied); the rest."""

    total: int
    active: int
    embedding: int
    unembedding: int

    @property
    def non_embedding(self) -> int:
        return self.total - self.embedding - self.unembedding


def per_token(config: Any, seq_len: int, batch: int = 1) -> PerToken:
    """Of a model section, at a sequence length. On the number of sequences in a `batch` depends only how far experts'
    rows are padded, in `matmul_forward`."""
    spec = resolve(config)
    blocks = [(n / seq_len, Block.flops(spec, block, n, batch * spec.streams)) for block, n in applied(spec, seq_len)]
    router = Recursion.flops(spec, seq_len)
    mixture = Aggregator.flops(spec) if spec.streams > 1 else Flops(0, 0)
    head = 2 * spec.width * spec.vocab_size
    body = spec.streams * (sum(share * block.exact for share, block in blocks) + router.exact) + mixture.exact
    matmul = spec.streams * (sum(share * block.matmul for share, block in blocks) + router.matmul) + mixture.matmul
    return PerToken(body + head, body, matmul + head)


def decode_per_token(config: Any, context: int) -> float:
    """Forward FLOPs of one decoded token that sees `context` tokens, itself included. Of recursions the expected ones,
    if they select as many tokens as their capacities say: each is then needed for a token in 1 / c_r and sees that
    share of the context."""
    spec = resolve(config)
    mixture = Aggregator.flops(spec).exact if spec.streams > 1 else 0
    body = sum(n / context * Block.decode_flops(spec, block, n) for block, n in applied(spec, context))
    body = spec.streams * (body + Recursion.flops(spec, context).exact)
    return body + mixture + 2 * spec.width * spec.vocab_size


def state_bytes(config: Any, length: int, dtype_bytes: int = 2) -> int:
    """Memory that decoding holds per sequence of `length` tokens: KV caches at `dtype_bytes`, float32 states; of every
    recursion a cache for all tokens."""
    spec = resolve(config)
    return spec.streams * sum(Block.state_bytes(spec, block, length, dtype_bytes) for block in spec.blocks)


def counts(config: Any) -> Counts:
    spec = resolve(config)
    tree = LanguageModel.tensors(spec)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    total = active = 0
    of_role = {"embedding": 0, "unembedding": 0}
    for path, tensor in leaves:
        assert isinstance(tensor, Tensor)
        if tensor.role == "buffer":
            continue
        times = spec.copies(path[0].key)
        total += times * tensor.size
        active += times * tensor.active_size
        if tensor.role in of_role:
            of_role[tensor.role] += times * tensor.size
    return Counts(total, active, **of_role)


def weight_products(config: Any, mask: Any) -> float:
    """Forward FLOPs per token of the products with the matrices where the mask, a tree like the parameters, is true:
    what training saves for each that is frozen, since it has no gradient."""
    spec = resolve(config)
    total = 0.0
    chosen = dict(jax.tree_util.tree_leaves_with_path(mask))
    for path, tensor in jax.tree_util.tree_leaves_with_path(LanguageModel.tensors(spec)):
        head = tensor.role == "unembedding" or (path[0].key == "embed" and spec.tied_embeddings)
        if chosen[path] and (head or tensor.role in ("hidden", "gate")):
            outside = head or path[0].key == "aggregator"  # of the streams
            total += 2 * tensor.active_size * uses(spec, path[0].key) * (1 if outside else spec.streams)
    return total


def conventions(config: Any, seq_len: int, tokens: float) -> dict[str, float]:
    """Training FLOPs of `tokens` tokens: `flops` (exact), `flops_6n` (6 N D), `flops_6n_non_embedding`.

    N is the parameters that one token uses.
    """
    n = counts(config)
    return {
        "flops": per_token(config, seq_len).training * tokens,
        "flops_6n": 6.0 * n.active * tokens,
        "flops_6n_non_embedding": 6.0 * (n.active - n.embedding - n.unembedding) * tokens,
    }


# ------------------------------------------------------------------------------------ an independent count


def jaxpr_matmul_flops(fn: Callable[..., Any], *args: Any) -> int:
    """FLOPs of the `dot_general`s in the jaxpr of fn(*args), bodies of scans times their length.

    (XLA's own cost analysis counts the body of a loop once.) Of a conditional, the dearest branch. Raises
    `NotImplementedError` for products inside a while loop, whose length is unknown. Arguments may be
    `jax.ShapeDtypeStruct`s.
    """
    return _matmul_flops(jax.make_jaxpr(fn)(*args).jaxpr)


def _matmul_flops(jaxpr: Jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracting, _), _ = eqn.params["dimension_numbers"]
            left, out = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
            total += 2 * math.prod(out) * math.prod(left[axis] for axis in contracting)
            continue
        inner = [_matmul_flops(body) for body in _bodies(eqn.params)]
        if name == "while" and any(inner):
            raise NotImplementedError("matrix products inside a while loop of unknown length")
        total += max(inner, default=0) if name == "cond" else sum(inner) * eqn.params.get("length", 1)
    return total


def _bodies(params: dict[str, Any]) -> list[Jaxpr]:
    values = [item for value in params.values() for item in (value if isinstance(value, tuple | list) else (value,))]
    return [v.jaxpr if isinstance(v, ClosedJaxpr) else v for v in values if isinstance(v, ClosedJaxpr | Jaxpr)]


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape
