"""ParScale (Chen et al. 2025, arXiv 2505.10475): P streams through one backbone, mixed per token before the head.

The streams are rows of the batch, those of one sequence next to each other, so that a batch sharded over devices keeps
them together. They differ by what each mixer adds per stream: learned key-value prefixes in attention, which every
query sees, unrotated and unnormed, outside any window *(choice)*; a learned vector on the input of a mixer that has no
keys *(choice: the paper has attention only)*. With x_1 .. x_P the streams after the final norm:

    w = softmax(W2 silu(W1 concat(x) + b1) + b2) in float32;   w = (1 - eps) w + eps / P;   x = sum_p w_p x_p

One stream is the plain model: no prefix, no aggregator. Initialisation, which was not published *(choice)*: prefixes,
W1 and W2 N(0, 0.02), biases 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scalelab.models.part import Part
from scalelab.models.spec import Flops, Spec
from scalelab.parametrization import Tensor


def start(z, depth):
    return 0.02 * z


class Aggregator(Part):
    @staticmethod
    def tensors(spec: Spec, options: None = None) -> dict[str, Tensor]:
        D, P = spec.width, spec.streams
        return {
            "inward": Tensor((P, D, D), "hidden", fan_in=P * D, start=start),
            "inward_bias": Tensor((D,), "vector"),
            "out": Tensor((D, P), "gate", fan_in=D, start=start),
            "out_bias": Tensor((P,), "vector"),
        }

    @staticmethod
    def flops(spec: Spec) -> Flops:
        D, P = spec.width, spec.streams
        matrices = 2 * P * D * D + 2 * D * P
        return Flops(matrices + 2 * P * D, matrices)

    def weights(self, x: Float[Array, "*b P D"]) -> Float[Array, "*b P"]:
        """Of the streams, per token: at least eps / P each, 1 together; float32."""
        P, eps = self.spec.streams, self.spec.stream_smoothing
        w = self.weight("inward").reshape(-1, x.shape[-1])
        h = jax.nn.silu(x.reshape(*x.shape[:-2], -1) @ w + self.weight("inward_bias"))
        z = (h @ self.weight("out")).astype(jnp.float32) + self.exact("out_bias")
        return (1 - eps) * jax.nn.softmax(z, axis=-1) + eps / P

    def __call__(self, x: Float[Array, "BP *t D"]) -> Float[Array, "B *t D"]:
        """Streams in the batch -> their mixture."""
        P = self.spec.streams
        x = jnp.moveaxis(x.reshape(-1, P, *x.shape[1:]), 1, -2)
        w = self.weights(x).astype(x.dtype)
        return jnp.sum(w[..., None] * x, axis=-2)


class StreamVector(Part):
    """A learned vector per stream, added to the input of a mixer without keys."""

    @staticmethod
    def tensors(spec: Spec, options: None = None) -> dict[str, Tensor]:
        return {"vector": Tensor((spec.streams, spec.width), "vector", start=start)}

    def __call__(self, x: Float[Array, "BP *t D"]) -> Float[Array, "BP *t D"]:
        vector = per_row(self.weight("vector"), x.shape[0])
        return x + vector.reshape(x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])


def spread(x: Array | None, streams: int) -> Array | None:
    """Every row of the batch, `streams` times in a row."""
    return x if x is None or streams == 1 else jnp.repeat(x, streams, axis=0)


def per_row(a: Float[Array, "P *s"], rows: int) -> Float[Array, "BP *s"]:
    """What each stream has, for every row of the batch."""
    return jnp.tile(a, (rows // a.shape[0], *(1,) * (a.ndim - 1)))
