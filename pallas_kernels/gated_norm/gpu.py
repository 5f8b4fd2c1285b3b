"""The gated norm on Hopper, in Mosaic GPU: every array is read or written once, in either pass.

A warpgroup has the channels of a group (all of them, where there is one), each thread some, and walks tokens of a row.
They arrive by TMA, two in flight; what is written of a token lies over what was read of it, and leaves by TMA. The
backward pass needs two sums over the channels before it can write anything, and reads the token in shared memory twice,
so that little waits in registers for these sums. Sums over tokens, for gain and skip: each thread has those of its
channels in registers over a block's tokens, XLA adds the blocks up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels import compat, dispatch
from pallas_kernels.gated_norm.xla import F32
from pallas_kernels.population import folded

LINE = 128  # channels lie as (lines, LINE), since TMA copies at most 256 along an axis; a block has as many threads
SLOTS = 3  # tokens in shared memory: one that is worked on, one that arrives, and one that arrives or leaves
LARGEST_GROUP = 4096  # channels, by the registers of a thread
SMS = 132  # of an H100; with others, blocks are more or fewer than are ever at work at once

Parts = list[Array]  # of a group's channels, each part the neighbours that a thread reads at once, of all threads
Read = Callable[[int, int], Array]
Write = Callable[[int, int, Array], None]
Token = Callable[[Read, Write, Parts, Parts, list[Parts]], list[Parts]]


def refusal(y: Array, u: Array, z: Array, groups: int) -> str:
    """Why the kernels do not take these arguments; "" where they do."""
    if y.dtype not in (jnp.bfloat16, F32) or not y.dtype == u.dtype == z.dtype:
        return f"takes bfloat16 or float32, not {y.dtype} with {u.dtype} and {z.dtype}"
    channels = y.shape[-1] // groups
    if channels % LINE or channels > LARGEST_GROUP:
        return f"takes groups of a multiple of {LINE} channels up to {LARGEST_GROUP}, not of {channels}"
    return ""


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def gated_norm(y: Array, u: Array, z: Array, skip: Array, gain: Array, groups: int, eps: float) -> Array:
    """As `gated_norm`."""
    out = folded(partial(_values, eps), shared=(3,))(*_lines((y, u, z), groups), _weights(skip, gain, groups))
    return out.reshape(y.shape)


def _forward(y: Array, u: Array, z: Array, skip: Array, gain: Array, groups: int, eps: float) -> tuple[Array, Any]:
    return gated_norm(y, u, z, skip, gain, groups, eps), (y, u, z, skip, gain)


def _backward(groups: int, eps: float, kept: Any, d_out: Array) -> tuple[Array, ...]:
    *arrays, skip, gain = kept
    d_y, d_z, sums = folded(partial(_gradients, eps), shared=(4,))(
        *_lines((*arrays, d_out), groups), _weights(skip, gain, groups)
    )
    d_y, d_z = d_y.reshape(d_out.shape), d_z.reshape(d_out.shape)
    d_gain, d_skip = jnp.sum(sums, axis=(0, 1)).reshape(2, -1)
    d_u = (_by_channel(skip, gain) * d_y).astype(d_y.dtype)
    return d_y, d_u, d_z, d_skip.reshape(len(skip), -1).sum(1).astype(skip.dtype), d_gain.astype(gain.dtype)


gated_norm.defvjp(_forward, _backward)


def _lines(arrays: tuple[Array, ...], groups: int) -> list[Array]:
    """(rows, T, groups, lines, LINE)."""
    return [a.reshape(*a.shape[:-1], groups, -1, LINE) for a in arrays]


def _by_channel(skip: Array, gain: Array) -> Array:
    return jnp.repeat(skip.astype(F32), len(gain) // len(skip))


def _weights(skip: Array, gain: Array, groups: int) -> Array:
    """(1, 2, groups, lines, LINE): the gain, and each channel's skip."""
    return jnp.stack([gain.astype(F32), _by_channel(skip, gain)]).reshape(1, 2, groups, -1, LINE)


# ------------------------------------------------------------------------------------------------------------- a token


def _sigmoid(z: Array) -> Array:
    root = lax.rsqrt(1.0 + jnp.exp2(z * -math.log2(math.e)))
    return root * root  # a quotient would be exact, in ten instructions


def _values(eps: float, *arrays: Array) -> Array:
    """out (rows, T, groups, lines, LINE) of y, u, z, weights."""
    channels = math.prod(arrays[0].shape[3:])

    def token(read: Read, write: Write, gain: Parts, skip: Parts, sums: list[Parts]) -> list[Parts]:
        h, squares = [], 0.0
        for p, D in enumerate(skip):
            z = read(2, p)
            h.append((read(0, p) + D * read(1, p)) * z * _sigmoid(z))
            squares += h[p] * h[p]
        root = lax.rsqrt(jnp.sum(squares) / channels + eps)
        for p, a in enumerate(h):
            write(0, p, a * gain[p] * root)
        return sums

    return _walk("gated_norm_forward", token, arrays, 1, 0)[0]


def _gradients(eps: float, *arrays: Array) -> list[Array]:
    """d_y, d_z (rows, T, groups, lines, LINE), and of each block the gradients of gain and every channel's skip
    (rows, blocks, 2, groups, lines, LINE), of y, u, z, d_out, weights."""
    channels = math.prod(arrays[0].shape[3:])

    def token(read: Read, write: Write, gain: Parts, skip: Parts, sums: list[Parts]) -> list[Parts]:
        """d_h = root (d_n - n mean(d_n n)) of n = root h."""
        sigmoid, squares, along = [], 0.0, 0.0
        for p, D in enumerate(skip):
            z = read(2, p)
            sigmoid.append(_sigmoid(z))
            h = (read(0, p) + D * read(1, p)) * z * sigmoid[p]
            squares += h * h
            along += h * gain[p] * read(3, p)
        root = lax.rsqrt(jnp.sum(squares) / channels + eps)
        back = jnp.sum(along) / channels * root * root * root
        d_gain, d_skip = [], []
        for p, D in enumerate(skip):
            u, z, d_out, s = read(1, p), read(2, p), read(3, p) * root, sigmoid[p]
            x = read(0, p) + D * u
            h = x * z * s
            d_gated = (gain[p] * d_out - h * back) * s
            d_y = d_gated * z
            write(0, p, d_y)
            write(1, p, d_gated * x * (1.0 + z * (1.0 - s)))
            d_gain.append(sums[0][p] + h * d_out)
            d_skip.append(sums[1][p] + d_y * u)
        return [d_gain, d_skip]

    return _walk("gated_norm_backward", token, arrays, 2, 2)


# --------------------------------------------------------------------------------------------------------- all of them


def _at_work(lines: int) -> int:
    """Blocks that a multiprocessor has at once, by its registers: as compiled, a thread of the backward pass takes
    about 24 and 9 for each of its channels."""
    return max(2, 65536 // (LINE * (24 + 9 * lines)))


def _walk(name: str, token: Token, inputs: tuple[Array, ...], results: int, summed: int) -> list[Array]:
    """`token(read, write, gain, skip, sums)` of every token: `read(k, p)` is part p of its channels of the k-th array,
    in float32, `write(k, p, a)` makes a that part of the k-th of so many `results`, which are arrays like the inputs;
    it returns the `summed` sums with its own added. `inputs`: the weights (members, 2, groups, lines, LINE) behind the
    arrays (rows, T, groups, lines, LINE)."""
    *arrays, weights = inputs
    shape, dtype = arrays[0].shape, arrays[0].dtype
    rows, T, groups, lines, _ = shape
    members, count = rows // weights.shape[0], len(arrays)
    blocks = max(1, min(T, SMS * _at_work(lines) // (rows * groups)))
    deep = math.gcd(lines, 8 // dtype.itemsize)
    layout = plgpu.Layout.WG_STRIDED((deep, LINE), vec_size=deep)
    parts = [pl.ds(first, deep) for first in range(0, lines, deep)]

    def kernel(*refs: Any) -> None:
        given, weights_g, refs = refs[:count], refs[count], refs[count + 1 :]
        written, sums_g, refs = refs[:results], refs[results : results + bool(summed)], refs[results + bool(summed) :]
        *slots, arrived = refs
        row, group, block = (lax.axis_index(name) for name in ("row", "group", "block"))
        tokens = lax.div(T - 1 - block, blocks) + 1

        def fetch(i: Any) -> None:
            slot = lax.rem(i, SLOTS)
            for g, s in zip(given, slots, strict=True):
                plgpu.copy_gmem_to_smem(g.at[row, block + i * blocks, group], s.at[slot], arrived.at[slot])

        def load(ref: Any) -> Array:
            return compat.gpu_load(ref, layout).astype(F32)

        for i in range(SLOTS - 1):
            pl.when(i < tokens)(partial(fetch, jnp.int32(i)))
        gain, skip = ([load(weights_g.at[lax.div(row, members), j, group, part]) for part in parts] for j in range(2))

        def one_token(i: Any, sums: list[Parts]) -> list[Parts]:
            slot = lax.rem(i, SLOTS)
            plgpu.barrier_wait(arrived.at[slot])
            over = slots[-results:]

            def write(k: int, p: int, a: Array) -> None:
                over[k][slot, parts[p]] = a.astype(dtype)

            sums = token(lambda k, p: load(slots[k].at[slot, parts[p]]), write, gain, skip, sums)
            plgpu.commit_smem()
            for s, g in zip(over, written, strict=True):
                there = g.at[row, block + i * blocks, group]
                plgpu.copy_smem_to_gmem(s.at[slot], there, commit_group=False)
            plgpu.commit_smem_to_gmem_group()

            @pl.when(i + SLOTS - 1 < tokens)
            def _() -> None:
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # for all but what has just begun to leave
                fetch(i + SLOTS - 1)

            return sums

        none = plgpu.layout_cast(jnp.zeros((deep, LINE), F32), layout)
        sums = lax.fori_loop(0, tokens, one_token, [[none] * len(parts)] * summed)
        for j, total in enumerate(sums):
            for p, part in enumerate(parts):
                sums_g[0][row, block, j, group, part] = total[p]
        plgpu.wait_smem_to_gmem(0)

    sums = [jax.ShapeDtypeStruct((rows, blocks, summed, groups, lines, LINE), F32)] if summed else []
    run = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(shape, dtype)] * results + sums,
        scratch_types=[
            *[plgpu.SMEM((SLOTS, lines, LINE), dtype)] * count,
            plgpu.Barrier(num_arrivals=count, num_barriers=SLOTS),
        ],
        grid=(rows, groups, blocks),
        grid_names=("row", "group", "block"),
        kernel_name=name,
        interpret=compat.gpu_interpreter() if dispatch.interpret() else None,
        # Threads read and write what is theirs; the copy out comes after `commit_smem`, which is a barrier, and a sum
        # over the threads has barriers of its own.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    return list(run(*inputs))
