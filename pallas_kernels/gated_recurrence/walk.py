"""The kernel of the recurrence on Hopper: one warpgroup walks the chunks of a head, the state in its registers.

A chunk takes four products: scores = q k^T, what the state gives q S, what k writes into the state k^T v', and the
decayed scores times v. The state is float32 and is rounded only as the operand of q S.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array, Float

from pallas_kernels import compat, dispatch
from pallas_kernels.gated_recurrence.sweeps import F32, Gates

plgpu: Any = mosaic_gpu  # what its annotations say differs between versions of JAX
L = 64  # tokens of a chunk and columns of a block of values: the rows of one wgmma
SQUARE = (L, L)
WGMMA = plgpu.Layout.WGMMA
HALF = 110 * 1024  # bytes of shared memory, of a multiprocessor's 228 KiB, less what the compiler and the driver take
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def walk(
    q: Float[Array, "B T Hq K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T Hv V"],
    gates: Gates,
    state: Float[Array, "B H K V"],
    *,
    reverse: bool = False,
    weigh: Float[Array, "B T Hw V"] | None = None,
    keep: bool = False,
    against: Float[Array, "B H C K V"] | None = None,
    share: Float[Array, "B H C V"] | None = None,
    eps: float = 0.0,
) -> dict[str, Array]:
    """As `sweeps` says, over blocks of L columns of the values; cross has a number for each key."""
    (B, T, _, V), K, dtype = v.shape, q.shape[3], v.dtype
    H, order, stacked = state.shape[1], list(gates), jnp.stack(list(gates.values()), axis=2)
    R, padded = stacked.shape[2:]
    divided, biased = "bound" in gates, share is not None
    N, C = V // L, padded // L
    early = {"q": (K, q), "k": (K, k)} | ({} if against is None else {"against": (L, against)})
    late = {"v": (L, v), "gates": (L, stacked)} | ({} if weigh is None else {"weigh": (L, weigh)})
    late |= {"share": (L, share)} if biased else {}
    outputs = {
        "out": jax.ShapeDtypeStruct((B, T, H, V), dtype),
        "final": jax.ShapeDtypeStruct((B, H, K, V), F32),
        "sums": None if weigh is None else jax.ShapeDtypeStruct((B, H, N, 2, padded), F32),
        "states": jax.ShapeDtypeStruct((B, H, C, K, V), dtype) if keep else None,
        "cross": None if against is None else jax.ShapeDtypeStruct((B, H, N, C, K), F32),
        "norm": jax.ShapeDtypeStruct((B, H, padded), F32) if divided else None,
    }
    outputs = {name: a for name, a in outputs.items() if a is not None}

    n_early, n_late = buffers(K, weigh is not None, against is not None), 2

    def tile(*shape: int) -> Any:
        return plgpu.SMEM(shape, dtype, transforms=TILED)

    ins = {
        "q": tile(n_early, L, K),
        "k": tile(n_early, L, K),
        "against": tile(n_early, K, L),
        "v": tile(n_late, L, L),
        "gates": plgpu.SMEM((n_late, R, L), F32),
        "weigh": tile(n_late, L, L),
        "share": plgpu.SMEM((n_late, L), F32),
    }
    scratch = {
        "ins": {name: ins[name] for name in early | late},
        "early_there": plgpu.Barrier(num_arrivals=len(early), num_barriers=n_early),
        "late_there": plgpu.Barrier(num_arrivals=len(late), num_barriers=n_late),
        "S_low": tile(K, L),
        "square": tile(L, L),
        "sums": plgpu.SMEM((2, L), F32) if weigh is not None else None,
        "cross": plgpu.SMEM((K,), F32) if against is not None else None,
        "norm": plgpu.SMEM((L,), F32) if divided else None,
    }

    def kernel(*refs, ins, early_there, late_there, S_low, square, sums, cross, norm):
        names = [*early, *late, "state", *outputs]
        gmem = dict(zip(names, refs, strict=True))
        n, row = lax.axis_index("n"), lax.axis_index("row")
        b, h = lax.div(row, jnp.int32(H)), lax.rem(row, jnp.int32(H))
        columns = pl.ds(n * L, L)

        def place(i):
            return C - 1 - i if reverse else i

        def of(name, i):
            """The part of an input that chunk i needs."""
            ref, at = gmem[name], place(i)
            heads = ref.shape[1 if name in ("gates", "against", "share") else 2]
            g = h if heads == H else lax.div(h, jnp.int32(H // heads))
            tokens = pl.ds(at * L, L)
            match name:
                case "q" | "k":
                    return ref.at[b, tokens, g, :]
                case "gates":
                    return ref.at[b, g, :, tokens]
                case "against":
                    return ref.at[b, g, at, :, columns]
                case "share":
                    return ref.at[b, g, at, columns]
            return ref.at[b, tokens, g, columns]

        def fetch(group, there, i):
            slot = lax.rem(i, jnp.int32(there.shape[0]))
            for name in group:
                plgpu.copy_gmem_to_smem(of(name, i), ins[name].at[slot], there.at[slot])

        def fetch_if_any(group, there, i):
            @pl.when(i < C)
            def _():
                fetch(group, there, i)

        def store(smem, to):
            plgpu.copy_smem_to_gmem(smem, to, commit_group=False)

        def step(i, S):
            at = place(i)
            here_early, here_late = lax.rem(i, jnp.int32(n_early)), lax.rem(i, jnp.int32(n_late))
            chunk = {name: ins[name].at[here_early if name in early else here_late] for name in ins}
            q, k, v = (chunk[name] for name in ("q", "k", "v"))
            entering, written = ("left", "entering") if reverse else ("entering", "left")

            def gate(name):
                return chunk["gates"].at[order.index(name)]

            plgpu.barrier_wait(early_there.at[here_early])
            plgpu.barrier_wait(late_there.at[here_late])

            weighted = (plgpu.load(v, layout=WGMMA).astype(F32) * rows(gate(written))).astype(dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the chunk before: its buffers are free now
            S_low[...] = S.astype(dtype)
            square[...] = weighted
            if against is not None:
                cross[...] = jnp.sum(S * plgpu.load(chunk["against"], layout=WGMMA).astype(F32), axis=1)
            plgpu.commit_smem()
            if keep:
                store(S_low, gmem["states"].at[b, h, at, :, columns])
            carried = chunk["gates"][order.index("carried"), L - 1]

            def decay(scores):
                to = plgpu.broadcasted_iota(jnp.int32, SQUARE, 0, layout=WGMMA)
                source = plgpu.broadcasted_iota(jnp.int32, SQUARE, 1, layout=WGMMA)
                seen = source >= to if reverse else to >= source
                if "document_to" in gates:
                    seen = seen & (rows(gate("document_to")) == columns_(gate("document_of")))
                exponent = (
                    columns_(gate("to")) - rows(gate("of")) if reverse else rows(gate("to")) - columns_(gate("of"))
                )
                if biased:
                    scores = scores + (columns_ if reverse else rows)(gate("bias"))
                return scores * jnp.exp2(jnp.where(seen, exponent, -jnp.inf))

            def enter(products):
                """What the state gives, of its product with q."""
                if biased:
                    extra = columns_(chunk["share"])
                    products = products + (extra if reverse else extra * rows(gate("bias")))
                return products * rows(gate(entering))

            # With scores decayed while the other two products run, it needs more registers, which K = 256 has not;
            # those with K up to 128 and no `weigh` gain nothing.
            if weigh is not None and not dispatch.interpret():

                def products(scores, inherited, S_new):
                    S_new[...] = S * carried
                    plgpu.wgmma(scores, q, k.T)
                    plgpu.wgmma(inherited, q, S_low)
                    plgpu.wgmma(S_new, k.T, square)
                    weights = decay(plgpu.wgmma_accumulator_load(scores, wait_n=2)).astype(dtype)
                    scaled = enter(plgpu.wgmma_accumulator_load(inherited, wait_n=1))
                    inherited[...] = scaled
                    plgpu.wgmma(inherited, weights, v)
                    return scaled, plgpu.wgmma_accumulator_load(inherited, wait_n=0), S_new[...]

                inherited, out, S = pl.run_scoped(
                    products, plgpu.ACC(SQUARE, F32), plgpu.ACC(SQUARE, F32), plgpu.ACC((K, L), F32)
                )
                plgpu.commit_smem()
                fetch_if_any(early, early_there, i + n_early)
            else:
                scores, inherited, S = multiply((q, k.T), (q, S_low), (k.T, square, S * carried))
                plgpu.commit_smem()
                fetch_if_any(early, early_there, i + n_early)
                inherited, weights = enter(inherited), decay(scores)
                (out,) = multiply((weights.astype(dtype), v, inherited))
                if divided:
                    total = jnp.sum(weights, axis=1) + plgpu.load(gate("inherited"), layout=WGMMA.reduce(1))
                    norm[...] = total
                    bound = jnp.maximum(jnp.abs(total), plgpu.load(gate("bound"), layout=WGMMA.reduce(1)))
                    out = out * lax.broadcast_in_dim(1.0 / (bound + eps), SQUARE, [0])
            square[...] = out.astype(dtype)
            if weigh is not None:
                by = plgpu.load(chunk["weigh"], layout=WGMMA).astype(F32)
                sums[0] = jnp.sum(inherited * by, axis=1)
                sums[1] = jnp.sum((out - inherited) * by, axis=1)
            plgpu.commit_smem()
            tokens = pl.ds(at * L, L)
            store(square, gmem["out"].at[b, tokens, h, columns])
            if weigh is not None:
                store(sums, gmem["sums"].at[b, h, n, :, tokens])
            if against is not None:
                store(cross, gmem["cross"].at[b, h, n, at])
            if divided:  # blocks of columns find the same
                pl.when(n == 0)(lambda: store(norm, gmem["norm"].at[b, h, tokens]))
            plgpu.commit_smem_to_gmem_group()
            fetch_if_any(late, late_there, i + n_late)
            return S

        for group, there in (early, early_there), (late, late_there):
            for i in range(min(there.shape[0], C)):
                fetch(group, there, jnp.int32(i))
        S = plgpu.load(gmem["state"].at[b, h, :, columns], layout=WGMMA, optimized=False)
        gmem["final"][b, h, :, columns] = lax.fori_loop(0, C, step, S)
        plgpu.wait_smem_to_gmem(0)

    results = plgpu.kernel(
        kernel,
        out_type=tuple(outputs.values()),
        scratch_types=scratch,
        grid=(N, B * H),
        grid_names=("n", "row"),
        # every buffer that is written is followed by commit_smem or a wait, which are barriers
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=compat.gpu_interpreter() if dispatch.interpret() else None,
        kernel_name="gated_recurrence",
    )(*(a for _, a in (early | late).values()), state)
    return dict(zip(outputs, results, strict=True))


def buffers(K: int, weigh: bool, against: bool) -> int:
    """How many of q and k: as let two blocks share a multiprocessor, or two where even one each would not."""
    once = 2 * L * (K + L) + 2 * 2 * L * L * (1 + weigh) + 8 * 4 * 2 * L
    each = 2 * L * (2 * K + K * against)
    return 1 if once + each <= HALF < once + 2 * each else 2


def multiply(*products: Any) -> Any:
    """a b, a b + c, or a b + c + a' b' given as (a, b, c, (a', b')), of each, issued together to the tensor cores and
    waited for. The right factors are in shared memory, the left there or in registers."""
    starts, factors = [], []
    for a, b, *rest in products:
        zero = plgpu.layout_cast(jnp.zeros((a.shape[0], b.shape[1]), F32), WGMMA)
        starts.append(rest[0] if rest and rest[0] is not None else zero)
        factors.append([(a, b), *rest[1:]])
    if dispatch.interpret():  # which takes neither an operand from registers nor a sum that does not start at zero
        for i, pairs in enumerate(factors):
            for a, b in pairs:
                a = a if isinstance(a, jax.Array) else a[...]
                starts[i] += jnp.dot(a, b[...], preferred_element_type=F32)
        return starts

    def run(sums):
        for acc, pairs in zip(sums, factors, strict=True):
            for a, b in pairs:
                plgpu.wgmma(acc, a, b)

    return pl.run_state(run)([plgpu.ACC.init(c) for c in starts])


def rows(ref: Any) -> Array:
    """A number for each row of a square."""
    return lax.broadcast_in_dim(plgpu.load(ref, layout=WGMMA.reduce(1)), SQUARE, [0])


def columns_(ref: Any) -> Array:
    return lax.broadcast_in_dim(plgpu.load(ref, layout=WGMMA.reduce(0)), SQUARE, [1])
