"""The shapes at which `bench kernels` looks at every operation: those of training on an accelerator, small on a CPU.

Costs are those of the mathematics: FLOPs of the causal or chunked form (chunks of 64), each input read once, each
output written once; with gradients three times the products and bytes, of attention 3.5 times the products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import attention
from pallas_kernels.cross_entropy import cross_entropy
from pallas_kernels.delta_rule import delta_rule
from pallas_kernels.gated_norm import gated_norm
from pallas_kernels.gated_recurrence import gated_recurrence
from pallas_kernels.gla import gla
from pallas_kernels.grouped_matmul import KERNEL_TILE, grouped_matmul, ragged_matmul
from pallas_kernels.mlstm import mlstm
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.short_conv import short_conv
from pallas_kernels.slstm import slstm

F32 = jnp.float32
Draw = Callable[[jax.Array, tuple[int, ...]], jax.Array]


@dataclass(frozen=True)
class Input:
    shape: tuple[int, ...]
    dtype: Any
    draw: Draw


@dataclass(frozen=True)
class Case:
    """`op` of `pallas_kernels`. `inputs(rows)`: of a batch of so many; `inputs(rows, tokens)`: rows of that length."""

    op: str
    name: str
    rows: int
    inputs: Callable[..., Sequence[Input]]
    run: Callable[[str], Callable[..., Any]]  # kernels -> (*arrays) -> outputs
    flops: float
    gradient_factor: float = 3.0  # FLOPs with gradients over those without
    small: int = 1  # rows of the comparison with the definition
    short: int = 0  # and their tokens, where the definition keeps a state for each; 0: all
    baseline: str = "xla"  # what times and memory are compared with
    peer: dict[str, Any] = field(default_factory=dict)  # for `torch_ops`

    @property
    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct(i.shape, i.dtype) for i in self.inputs(self.rows)]

    def draw(self, key: jax.Array) -> list[jax.Array]:
        return self._draw(key, self.inputs(self.rows))

    def draw_small(self, key: jax.Array) -> list[jax.Array]:
        return self._draw(key, self.inputs(self.small, self.short) if self.short else self.inputs(self.small))

    def _draw(self, key: jax.Array, inputs: Sequence[Input]) -> list[jax.Array]:
        keys = jax.random.split(key, len(inputs))
        return [i.draw(k, i.shape).astype(i.dtype) for i, k in zip(inputs, keys, strict=True)]

    @property
    def bytes(self) -> float:
        out = jax.eval_shape(self.run("xla"), *self.shapes)
        return float(sum(a.size * a.dtype.itemsize for a in [*self.shapes, *jax.tree.leaves(out)]))

    @property
    def cost(self) -> tuple[float, float]:
        """(FLOPs, bytes) of the forward pass."""
        return self.flops, self.bytes

    @property
    def cost_both(self) -> tuple[float, float]:
        """With all gradients: inputs and cotangents read, outputs and gradients written, what was saved read."""
        return self.gradient_factor * self.flops, 3 * self.bytes


def like(shapes: Any, key: jax.Array) -> Any:
    """Random cotangents of outputs."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten([jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)])


# ------------------------------------------------------------------------------------ inputs


def normal(scale: float = 1.0, offset: float = 0.0) -> Draw:
    return lambda key, shape: offset + scale * jax.random.normal(key, shape)


def uniform(low: float, high: float) -> Draw:
    return lambda key, shape: jax.random.uniform(key, shape, minval=low, maxval=high)


def unit(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Vectors of length 1 along the last axis."""
    x = jax.random.normal(key, shape)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def whole(least: int, below: int) -> Draw:
    return lambda key, shape: jax.random.randint(key, shape, least, below)


# ------------------------------------------------------------------------------------ cases


def all_cases(platform: str, dtype: str = "bfloat16") -> list[Case]:
    D = jnp.dtype(dtype)
    if platform == "cpu":
        T, B = 256, 2
        return [
            attention_case(B, T, 4, 32, D),
            recurrence_case("simple GLA", B, T, 4, 4, 32, 32, D),
            recurrence_case("SSD", B, T, 1, 8, 32, 16, D),
            mlstm_case(B, T, 2, 32, 64, D),
            gla_case(B, T, 4, 32, D),
            delta_case(B, T, 4, 32, D),
            scan_case(B, T, 128, 16, D),
            convolution_case(B, T, 128, 4, D),
            norm_case(B, T, 16, 8, D),
            slstm_case(B, T, 4, 64),
            entropy_case(512, 64, 2048, D),
            tiles_case(4, 512, 64, 96, D),
            experts_case(4, 512, 64, 96, D),
        ]
    return [
        attention_case(8, 2048, 16, 64, D),
        attention_case(4, 4096, 16, 128, D),
        recurrence_case("simple GLA", 8, 4096, 16, 16, 128, 128, D),
        recurrence_case("SSD", 4, 4096, 1, 64, 128, 64, D),
        mlstm_case(4, 8192, 8, 256, 512, D),
        mlstm_case(8, 4096, 16, 128, 128, D),
        gla_case(8, 4096, 16, 128, D),
        delta_case(8, 4096, 16, 128, D),
        scan_case(4, 4096, 2048, 16, D),
        convolution_case(8, 2048, 1792, 4, D),
        norm_case(8, 2048, 28, 64, D),
        norm_case(8, 2048, 56, 64, D),
        slstm_case(16, 2048, 4, 128),
        entropy_case(16384, 1024, 32768, D),
        entropy_case(16384, 2048, 131072, D),
        tiles_case(8, 32768, 1024, 2816, D),
        tiles_case(64, 131072, 1024, 384, D),
        experts_case(64, 131072, 1024, 384, D),
        experts_case(64, 131072, 1024, 352, D),
        experts_case(64, 131072, 384, 1024, D),
    ]


def attention_case(B: int, T: int, H: int, d: int, dtype: Any) -> Case:
    return Case(
        "attention", f"B{B} T{T} H{H} d{d}", B,
        lambda rows: [Input((rows, T, H, d), dtype, normal())] * 3,
        lambda kernels: partial(attention, kernels=kernels),
        2 * B * H * d * T * (T + 1), 3.5, peer={"op": "attention", "B": B, "T": T, "H": H, "d": d},
    )  # fmt: skip


def recurrence_case(kind: str, B: int, T: int, G: int, H: int, dk: int, dv: int, dtype: Any) -> Case:
    def inputs(rows: int, T: int = T) -> list[Input]:
        shared = Input((rows, T, G, dk), dtype, normal(dk**-0.25))
        return [shared, shared, Input((rows, T, H, dv), dtype, normal()), Input((rows, T, H), F32, uniform(-0.1, 0))]

    flops = B * T * (G * 2 * dk * 32.5 + H * (2 * dv * 32.5 + 4 * dk * dv + 2 * dk * dv / 64))
    return Case(
        "gated_recurrence", f"{kind} B{B} T{T} G{G} H{H} {dk}x{dv}", B, inputs,
        lambda kernels: partial(gated_recurrence, kernels=kernels), flops, short=min(T, 1024),
    )  # fmt: skip


def mlstm_case(B: int, T: int, H: int, dk: int, dv: int, dtype: Any) -> Case:
    def inputs(rows: int, T: int = T) -> list[Input]:
        # Queries and keys with a common part, and input gates that start closed, as trained cells have them: else
        # the normaliser passes near 0, and bfloat16's rounding alone is all of the error.
        shared = Input((rows, T, H, dk), dtype, normal(0.5, 0.5))
        gates = [Input((rows, T, H), F32, normal(1.0, -4.0)), Input((rows, T, H), F32, uniform(3.0, 6.0))]
        return [shared, shared, Input((rows, T, H, dv), dtype, normal()), *gates]

    flops = B * T * H * (2 * (dk + dv) * 32.5 + 4 * dk * dv + 2 * dk * dv / 64 + 4 * dk)
    return Case(
        "mlstm", f"B{B} T{T} H{H} {dk}x{dv}", B, inputs,
        lambda kernels: lambda *a: mlstm(*a, kernels=kernels)[0], flops, short=min(T, 1024),
    )  # fmt: skip


def gla_case(B: int, T: int, H: int, d: int, dtype: Any) -> Case:
    def inputs(rows: int, T: int = T) -> list[Input]:
        parts = [Input((rows, T, H, d), dtype, normal(scale)) for scale in (d**-0.25, d**-0.25, 1.0)]
        return [*parts, Input((rows, T, H, d), F32, uniform(-0.1, 0))]

    flops = B * T * H * (4 * d * 32.5 + 4 * d * d)
    return Case(
        "gla", f"B{B} T{T} H{H} {d}x{d}", B, inputs,
        lambda kernels: partial(gla, kernels=kernels), flops, short=min(T, 1024),
    )  # fmt: skip


def delta_case(B: int, T: int, H: int, d: int, dtype: Any) -> Case:
    def inputs(rows: int, T: int = T) -> list[Input]:
        parts = [Input((rows, T, H, d), dtype, draw) for draw in (unit, unit, normal())]
        return [*parts, Input((rows, T, H), F32, uniform(0, 1)), Input((rows, T, H), F32, uniform(-0.1, 0))]

    flops = B * T * H * (10 * d * 32.5 + 6 * d * d + 64**2 / 3)
    return Case(
        "delta_rule", f"B{B} T{T} H{H} {d}x{d}", B, inputs,
        lambda kernels: partial(delta_rule, kernels=kernels), flops, short=min(T, 1024),
    )  # fmt: skip


def scan_case(B: int, T: int, E: int, N: int, dtype: Any) -> Case:
    def inputs(rows: int, T: int = T) -> list[Input]:
        return [
            Input((rows, T, E), dtype, normal()),
            Input((rows, T, E), F32, lambda key, shape: jnp.exp(uniform(math.log(1e-3), math.log(1e-1))(key, shape))),
            Input((E, N), F32, lambda key, shape: -jnp.exp(normal()(key, shape))),
            Input((rows, T, N), dtype, normal()),
            Input((rows, T, N), dtype, normal()),
        ]

    return Case(
        "selective_scan", f"B{B} T{T} E{E} N{N}", B, inputs,
        lambda kernels: partial(selective_scan, kernels=kernels), 7.0 * B * T * E * N, short=min(T, 1024),
        baseline="reference",  # `associative_scan`
    )  # fmt: skip


def convolution_case(B: int, T: int, E: int, K: int, dtype: Any) -> Case:
    def inputs(rows: int) -> list[Input]:
        wide = [Input((rows, T, E), dtype, normal()), Input((rows, K - 1, E), dtype, normal())]
        return [*wide, Input((K, E), F32, uniform(-(K**-0.5), K**-0.5)), Input((E,), F32, normal())]

    return Case(
        "short_conv", f"B{B} T{T} E{E} K{K}", B, inputs,
        lambda kernels: partial(short_conv, kernels=kernels), 2.0 * B * T * E * K,
    )  # fmt: skip


def norm_case(B: int, T: int, H: int, P: int, dtype: Any) -> Case:
    def inputs(rows: int) -> list[Input]:
        weights = [Input((H,), dtype, normal(0.1, 1.0)), Input((H * P,), F32, normal(0.1, 1.0))]
        return [*[Input((rows, T, H * P), dtype, normal())] * 3, *weights]

    return Case(
        "gated_norm", f"B{B} T{T} E{H * P}", B, inputs,
        lambda kernels: partial(gated_norm, eps=1e-5, kernels=kernels), 12.0 * B * T * H * P,
    )  # fmt: skip


def slstm_case(B: int, T: int, H: int, d: int) -> Case:
    def inputs(rows: int, T: int = T) -> list[Input]:
        return [Input((rows, T, H, 4, d), F32, normal()), Input((4, H, d, d), F32, normal(0.5 * d**-0.5))]

    return Case(
        "slstm", f"B{B} T{T} H{H} d{d}", B, inputs, lambda kernels: lambda *a: slstm(*a, kernels=kernels)[0],
        8.0 * B * T * H * d * d, short=min(T, 1024),
    )  # fmt: skip


def entropy_case(N: int, D: int, V: int, dtype: Any) -> Case:
    def inputs(rows: int) -> list[Input]:
        return [
            Input((rows, D), dtype, normal()), Input((D, V), F32, normal(D**-0.5)),
            Input((rows,), jnp.int32, whole(0, V)),
        ]  # fmt: skip

    def run(kernels: str) -> Callable[..., Any]:  # in chunks, also of the few rows of the comparison
        return lambda x, *rest: cross_entropy(x, *rest, chunk=min(2048, len(x) // 4), kernels=kernels)

    return Case(
        "cross_entropy", f"N{N} D{D} V{V}", N, inputs, run, 2.0 * N * D * V, small=256,
        baseline="reference",  # logits at once
    )  # fmt: skip


def experts_case(G: int, M: int, K: int, N: int, dtype: Any) -> Case:
    def inputs(rows: int) -> list[Input]:
        sizes = uneven(rows, G, 16 if rows == M else 1)
        return [
            Input((rows, K), dtype, normal()), Input((G, K, N), dtype, normal(K**-0.5)),
            Input((G,), jnp.int32, lambda key, shape: jnp.asarray(sizes)),
        ]  # fmt: skip

    return Case(
        "grouped_matmul", f"E{G} M{M} {K}x{N} ragged", M, inputs,
        lambda kernels: partial(ragged_matmul, kernels=kernels), 2.0 * M * K * N, small=1024,
        peer={"op": "grouped_matmul", "sizes": uneven(M, G, 16), "K": K, "N": N},
    )  # fmt: skip


def tiles_case(G: int, M: int, K: int, N: int, dtype: Any) -> Case:
    """As a mixture lays its rows out: in tiles, each of one group."""

    def inputs(rows: int) -> list[Input]:
        sizes = np.asarray(uneven(rows, G, 1))
        tiles = -(-sizes // KERNEL_TILE)
        group = np.repeat(np.arange(G), tiles)
        first = np.arange(len(group)) - np.repeat(np.cumsum(tiles) - tiles, tiles)  # tiles of its group before each
        filled = first[:, None] * KERNEL_TILE + np.arange(KERNEL_TILE) < sizes[group, None]
        rows_of = jnp.asarray(filled[:, :, None])
        return [
            Input((len(group), KERNEL_TILE, K), dtype, lambda key, shape: rows_of * normal()(key, shape)),
            Input((G, K, N), dtype, normal(K**-0.5)),
            Input((len(group),), jnp.int32, lambda key, shape: jnp.asarray(group)),
        ]

    return Case(
        "grouped_matmul", f"E{G} M{M} {K}x{N} tiles", M, inputs,
        lambda kernels: partial(grouped_matmul, kernels=kernels), 2.0 * M * K * N, small=1024,
        peer={"op": "grouped_matmul", "sizes": uneven(M, G, 16), "K": K, "N": N},
    )  # fmt: skip


def uneven(rows: int, groups: int, unit: int) -> list[int]:
    """Sizes of groups, the same ones always, that are multiples of `unit`, as PyTorch's operation wants them."""
    share = np.random.default_rng(7).dirichlet(np.full(groups, 8.0))
    sizes = np.floor(share * rows / unit).astype(int) * unit
    sizes[-1] += rows - sizes.sum()
    return sizes.tolist()


OPS = tuple(dict.fromkeys(case.op for case in all_cases("cpu")))
