"""Gradients of queries and keys that heads share, on Hopper: no walk, since the states before and behind every chunk
are known, and the sums over the heads stay on chip.

A block has a chunk of one group and takes its heads in turn, which arrive by TMA, the next while one is worked on. With
M the sum over the heads of what their tokens weigh, do v^T decayed, S the state before the chunk and dS the gradient of
that behind it,

    dq = M k + sum_h entering S do        dk = M^T q + sum_h left dS v

One warpgroup adds up M, two have dq and dk, whose first term waits for M. For the decays' gradients there are, of each
head, q . dq in two parts, k . dk in the chunk, and the product of S and dS. The first and the second within the chunk
are sums of the same numbers: their differences are small, and would be rounding errors else.
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
from pallas_kernels.gated_recurrence.walk import SQUARE, TILED, WGMMA, L, columns_, multiply, rows

plgpu: Any = mosaic_gpu  # what its annotations say differs between versions of JAX
SLOTS = 2  # heads in shared memory: one that is worked on, one that arrives
SHARED = 224 * 1024  # bytes that one block may have
WEIGHTS, QUERIES, KEYS = range(3)  # the warpgroups


def fits(K: int, V: int) -> bool:
    """Whether the kernel takes keys and values of such widths, multiples of L. Wider values spill registers."""
    head, gates = 2 * L * 2 * V + 2 * 2 * K * V, 8 * 4 * L
    return V == L and SLOTS * (head + gates) + 4 * 2 * L * K + 2 * L * L <= SHARED


def gradients(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    d_out: Float[Array, "B T H V"],
    gates: Gates,
    before: Float[Array, "B H C K V"],
    behind: Float[Array, "B H C K V"],
) -> dict[str, Array]:
    """d_q and d_k (B, T, G, K); of each head q_sums (B, H, 2, C L), q . dq by the state and in the chunk, and k_sums
    (B, H, C L), k . dk in the chunk; cross (B, H, C, K): the sum of S dS for each key. `gates`: as `sweeps` says."""
    (B, _, H, V), (G, K), dtype = v.shape, q.shape[2:], v.dtype
    order, stacked = list(gates), jnp.stack(list(gates.values()), axis=2)
    C, R, each = before.shape[2], len(order), H // G
    heads = {"v": v, "d_out": d_out, "before": before, "behind": behind, "gates": stacked}
    outputs = {
        "d_q": jax.ShapeDtypeStruct(q.shape, dtype),
        "d_k": jax.ShapeDtypeStruct(k.shape, dtype),
        "q_sums": jax.ShapeDtypeStruct((B, H, 2, C * L), F32),
        "k_sums": jax.ShapeDtypeStruct((B, H, C * L), F32),
        "cross": jax.ShapeDtypeStruct((B, H, C, K), F32),
    }

    def tile(*shape: int) -> Any:
        return plgpu.SMEM(shape, dtype, transforms=TILED)

    scratch = {
        "of_head": {
            "v": tile(SLOTS, L, V),
            "d_out": tile(SLOTS, L, V),
            "before": tile(SLOTS, K, V),
            "behind": tile(SLOTS, K, V),
            "gates": plgpu.SMEM((SLOTS, R, L), F32),
        },
        "q_s": tile(L, K),
        "k_s": tile(L, K),
        "d_q_s": tile(L, K),
        "d_k_s": tile(L, K),
        "M_s": tile(L, L),
        "keys_there": plgpu.Barrier(num_arrivals=2),
        "there": plgpu.Barrier(num_arrivals=len(heads), num_barriers=SLOTS),
        "free": plgpu.Barrier(num_arrivals=3, num_barriers=SLOTS),
        "M_there": plgpu.Barrier(num_arrivals=1),
    }

    def kernel(*refs, of_head, q_s, k_s, d_q_s, d_k_s, M_s, keys_there, there, free, M_there):
        gmem = dict(zip(["q", "k", *heads, *outputs], refs, strict=True))
        chunk, row, wg = lax.axis_index("chunk"), lax.axis_index("row"), lax.axis_index("wg")
        b, g = lax.div(row, jnp.int32(G)), lax.rem(row, jnp.int32(G))
        tokens = pl.ds(chunk * L, L)

        def slot_of(i):
            return lax.rem(i, jnp.int32(SLOTS))

        def fetch(i):
            h, slot = g * each + i, slot_of(i)
            for name in heads:
                of = gmem[name].at[b]
                match name:
                    case "v" | "d_out":
                        of = of.at[tokens, h, :]
                    case "before" | "behind":
                        of = of.at[h, chunk]
                    case "gates":
                        of = of.at[h, :, tokens]
                plgpu.copy_gmem_to_smem(of, of_head[name].at[slot], there.at[slot])

        def each_head(work, *start):
            """work(head, its parts, *sums) -> sums, over the heads."""

            def step(i, sums):
                slot = slot_of(i)
                parts = {name: ref.at[slot] for name, ref in of_head.items()}
                plgpu.barrier_wait(there.at[slot])
                sums = work(g * each + i, parts, *sums)
                plgpu.barrier_arrive(free.at[slot])

                @pl.when((wg == WEIGHTS) & (i + SLOTS < each))
                def _():
                    plgpu.barrier_wait(free.at[slot])
                    plgpu.commit_smem()  # what was read there was read before what is copied there
                    fetch(i + SLOTS)

                return sums

            return lax.fori_loop(0, each, step, start)

        def gate(parts, name):
            return parts["gates"].at[order.index(name)]

        def loaded(ref):
            return plgpu.load(ref, layout=WGMMA).astype(F32)

        def zeros(*shape):
            return plgpu.layout_cast(jnp.zeros(shape, F32), WGMMA)

        def put(sums, name, h, part):
            compat.gpu_store(gmem[name].at[b, h, part, tokens], sums)

        @pl.when(wg == WEIGHTS)
        def _():
            for ref, to in (("q", q_s), ("k", k_s)):
                plgpu.copy_gmem_to_smem(gmem[ref].at[b, tokens, g, :], to, keys_there)
            for i in range(min(SLOTS, each)):
                fetch(jnp.int32(i))
            plgpu.barrier_wait(keys_there)
            (scores,) = multiply((q_s, k_s.T))

            def work(h, parts, M):
                (weights,) = multiply((parts["d_out"], parts["v"].T))
                to = plgpu.broadcasted_iota(jnp.int32, SQUARE, 0, layout=WGMMA)
                source = plgpu.broadcasted_iota(jnp.int32, SQUARE, 1, layout=WGMMA)
                seen = to >= source
                if "document_to" in gates:
                    seen = seen & (rows(gate(parts, "document_to")) == columns_(gate(parts, "document_of")))
                exponent = rows(gate(parts, "to")) - columns_(gate(parts, "of"))
                weights = weights * jnp.exp2(jnp.where(seen, exponent, -jnp.inf))
                pairs = weights * scores
                put(jnp.sum(pairs, axis=1), "q_sums", h, 1)
                compat.gpu_store(gmem["k_sums"].at[b, h, tokens], jnp.sum(pairs, axis=0))
                return (M + weights,)

            (M,) = each_head(work, zeros(*SQUARE))
            for i in range(max(each - SLOTS, 0), each):  # the last of them: every arrival has been waited for
                plgpu.barrier_wait(free.at[i % SLOTS])
            M_s[...] = M.astype(dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(M_there)

        def store(d, staged, name):
            staged[...] = d.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged, gmem[name].at[b, tokens, g, :])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == QUERIES)
        def _():
            plgpu.barrier_wait(keys_there)

            def work(h, parts, d_q):
                entering = rows_of(gate(parts, "entering"), V)
                weighted = loaded(parts["d_out"]) * entering
                d_q, given = multiply((weighted.astype(dtype), parts["before"].T, d_q), (q_s, parts["before"]))
                put(jnp.sum(given * weighted, axis=1), "q_sums", h, 0)
                return (d_q,)

            (d_q,) = each_head(work, zeros(L, K))
            plgpu.barrier_wait(M_there)
            (d_q,) = multiply((M_s, k_s, d_q))
            store(d_q, d_q_s, "d_q")

        @pl.when(wg == KEYS)
        def _():
            plgpu.barrier_wait(keys_there)

            def work(h, parts, d_k):
                weighted = loaded(parts["v"]) * rows_of(gate(parts, "left"), V)
                (d_k,) = multiply((weighted.astype(dtype), parts["behind"].T, d_k))
                for first in range(0, K, L):
                    some = pl.ds(first, L)
                    cross = jnp.sum(loaded(parts["before"].at[some]) * loaded(parts["behind"].at[some]), axis=1)
                    compat.gpu_store(gmem["cross"].at[b, h, chunk, some], cross)
                return (d_k,)

            (d_k,) = each_head(work, zeros(L, K))
            plgpu.barrier_wait(M_there)
            (d_k,) = multiply((M_s.T, q_s, d_k))
            store(d_k, d_k_s, "d_k")

    found = plgpu.kernel(
        kernel,
        out_type=tuple(outputs.values()),
        scratch_types=scratch,
        grid=(C, B * G),
        grid_names=("chunk", "row"),
        num_threads=3,
        thread_name="wg",
        # every buffer that is written is followed by commit_smem, which is a barrier
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=compat.gpu_interpreter() if dispatch.interpret() else None,
        kernel_name="gradients_of_shared_keys",
    )(q, k, *heads.values())
    return dict(zip(outputs, found, strict=True))


def rows_of(ref: Any, width: int) -> Array:
    """A number for each row."""
    return lax.broadcast_in_dim(plgpu.load(ref, layout=WGMMA.reduce(1)), (L, width), [0])
