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

plgpu: Any = mosaic_gpu  # what its annotations say differs between versions of JAX
F32 = jnp.float32
L = 64  # tokens of a chunk and columns of a block of values: the rows of one wgmma
SQUARE = (L, L)
WGMMA = plgpu.Layout.WGMMA
HALF = 110 * 1024  # bytes of shared memory, of a multiprocessor's 228 KiB, less what the compiler and the driver take
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
# Rows of the gates. The exponent is there twice, as is the document: the compiler makes one of two loads from one
# place, and finds no layout for what is then both a column and a row.
TO, OF, ENTERING, LEFT, DOCUMENT_TO, DOCUMENT_OF = range(6)


def walk(
    q: Float[Array, "B T Hq K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T Hv V"],
    gates: Float[Array, "B Hg R C*L"],
    state: Float[Array, "B H K V"],
    *,
    reverse: bool = False,
    weigh: Float[Array, "B T Hw V"] | None = None,
    keep: bool = False,
    against: Float[Array, "B H C K V"] | None = None,
) -> dict[str, Array]:
    """One sweep over the chunks of all heads, forward or `reverse`; arrays of fewer heads are shared by groups.

    The rows of `gates` are named above: sums of log decays from the chunk's beginning, in base 2; what is left of the
    entering state at a token, and of a token at the chunk's end; and the number of its document, where there are any.

    out (B, T, H, V), in v's dtype, and final (B, H, K, V), the state after it. With `weigh`, sums
    (B, H, V / L, 2, C L): its product with what came of the state, and with the rest of out, over a block of columns.
    With `keep`, states (B, H, C, K, V) at the beginning of every chunk, in v's dtype. With `against`, cross
    (B, H, V / L, C, K): its product with the state before each chunk, over a block of columns.
    """
    (B, T, _, V), K, dtype = v.shape, q.shape[3], v.dtype
    H, (R, padded) = state.shape[1], gates.shape[2:]
    N, C = V // L, padded // L
    early = {"q": (K, q), "k": (K, k)} | ({} if against is None else {"against": (L, against)})
    late = {"v": (L, v), "gates": (L, gates)} | ({} if weigh is None else {"weigh": (L, weigh)})
    outputs = {
        "out": jax.ShapeDtypeStruct((B, T, H, V), dtype),
        "final": jax.ShapeDtypeStruct((B, H, K, V), F32),
        "sums": None if weigh is None else jax.ShapeDtypeStruct((B, H, N, 2, padded), F32),
        "states": jax.ShapeDtypeStruct((B, H, C, K, V), dtype) if keep else None,
        "cross": None if against is None else jax.ShapeDtypeStruct((B, H, N, C, K), F32),
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
    }
    scratch = {
        "ins": {name: ins[name] for name in early | late},
        "early_there": plgpu.Barrier(num_arrivals=len(early), num_barriers=n_early),
        "late_there": plgpu.Barrier(num_arrivals=len(late), num_barriers=n_late),
        "S_low": tile(K, L),
        "square": tile(L, L),
        "sums": plgpu.SMEM((2, L), F32) if weigh is not None else None,
        "cross": plgpu.SMEM((K,), F32) if against is not None else None,
    }

    def kernel(*refs, ins, early_there, late_there, S_low, square, sums, cross):
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
            heads = ref.shape[1 if name in ("gates", "against") else 2]
            g = h if heads == H else lax.div(h, jnp.int32(H // heads))
            tokens = pl.ds(at * L, L)
            match name:
                case "q" | "k":
                    return ref.at[b, tokens, g, :]
                case "gates":
                    return ref.at[b, g, :, tokens]
                case "against":
                    return ref.at[b, g, at, :, columns]
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
            q, k, v, gates = (chunk[name] for name in ("q", "k", "v", "gates"))
            entering, written = (LEFT, ENTERING) if reverse else (ENTERING, LEFT)
            plgpu.barrier_wait(early_there.at[here_early])
            plgpu.barrier_wait(late_there.at[here_late])

            weighted = (plgpu.load(v, layout=WGMMA).astype(F32) * rows(gates.at[written])).astype(dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the chunk before: its buffers are free now
            S_low[...] = S.astype(dtype)
            square[...] = weighted
            if against is not None:
                cross[...] = jnp.sum(S * plgpu.load(chunk["against"], layout=WGMMA).astype(F32), axis=1)
            plgpu.commit_smem()
            if keep:
                store(S_low, gmem["states"].at[b, h, at, :, columns])
            carried = gates[ENTERING, L - 1]

            def decay(scores):
                to = plgpu.broadcasted_iota(jnp.int32, SQUARE, 0, layout=WGMMA)
                source = plgpu.broadcasted_iota(jnp.int32, SQUARE, 1, layout=WGMMA)
                seen = source >= to if reverse else to >= source
                if R > DOCUMENT_TO:
                    seen = seen & (rows(gates.at[DOCUMENT_TO]) == columns_(gates.at[DOCUMENT_OF]))
                exponent = rows(gates.at[TO]) - columns_(gates.at[OF])
                exponent = jnp.where(seen, -exponent if reverse else exponent, -jnp.inf)
                return (scores * jnp.exp2(exponent)).astype(dtype)

            # With scores decayed while the other two products run, it needs more registers, which K = 256 has not;
            # those with K up to 128 and no `weigh` gain nothing.
            if weigh is not None and not dispatch.interpret():

                def products(scores, inherited, S_new):
                    S_new[...] = S * carried
                    plgpu.wgmma(scores, q, k.T)
                    plgpu.wgmma(inherited, q, S_low)
                    plgpu.wgmma(S_new, k.T, square)
                    weights = decay(plgpu.wgmma_accumulator_load(scores, wait_n=2))
                    scaled = plgpu.wgmma_accumulator_load(inherited, wait_n=1) * rows(gates.at[entering])
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
                inherited = inherited * rows(gates.at[entering])
                (out,) = multiply((decay(scores), v, inherited))
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
    once = 2 * L * (K + L) + 2 * 2 * L * L * (1 + weigh) + 6 * 4 * 2 * L
    each = 2 * L * (2 * K + K * against)
    return 1 if once + each <= HALF < once + 2 * each else 2


def multiply(*products: Any) -> Any:
    """a b, or a b + c, of each, issued together to the tensor cores and waited for. b in shared memory, a there or in
    registers."""
    starts = []
    for a, b, *c in products:
        zero = plgpu.layout_cast(jnp.zeros((a.shape[0], b.shape[1]), F32), WGMMA)
        starts.append(c[0] if c else zero)
    if dispatch.interpret():  # which takes neither an operand from registers nor a sum that does not start at zero
        values = [(a if isinstance(a, jax.Array) else a[...], b[...]) for a, b, *_ in products]
        return [c + jnp.dot(a, b, preferred_element_type=F32) for c, (a, b) in zip(starts, values, strict=True)]

    def run(sums):
        for acc, (a, b, *_) in zip(sums, products, strict=True):
            plgpu.wgmma(acc, a, b)

    return pl.run_state(run)([plgpu.ACC.init(c) for c in starts])


def rows(ref: Any) -> Array:
    """A number for each row of a square."""
    return lax.broadcast_in_dim(plgpu.load(ref, layout=WGMMA.reduce(1)), SQUARE, [0])


def columns_(ref: Any) -> Array:
    return lax.broadcast_in_dim(plgpu.load(ref, layout=WGMMA.reduce(0)), SQUARE, [1])
