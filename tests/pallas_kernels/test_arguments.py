"""Arguments that no form takes are refused by name."""

from functools import partial

import jax.numpy as jnp
import pytest

from pallas_kernels import attention, cross_entropy, delta_rule, gated_recurrence, gla, mlstm, selective_scan

TOKENS = jnp.zeros((1, 4, 2))  # of two heads, or of two channels
WIDE = jnp.zeros((1, 4, 2, 3))
CHUNKED = {
    "cross_entropy": partial(cross_entropy.cross_entropy, WIDE[0, 0], WIDE[0, 0].T, jnp.zeros(2, int)),
    "delta_rule": partial(delta_rule.delta_rule, WIDE, WIDE, WIDE, TOKENS),
    "gated_recurrence": partial(gated_recurrence.gated_recurrence, WIDE, WIDE, WIDE, TOKENS),
    "gla": partial(gla.gla, WIDE, WIDE, WIDE, WIDE),
    "mlstm": partial(mlstm.mlstm, WIDE, WIDE, WIDE, TOKENS, TOKENS),
    "selective_scan": partial(selective_scan.selective_scan, TOKENS, TOKENS, jnp.zeros((2, 4)), WIDE[0], WIDE[0]),
}


@pytest.mark.parametrize("op", CHUNKED)
@pytest.mark.parametrize("chunk", [0, -8])
def test_a_chunk_holds_a_token(op, chunk):
    with pytest.raises(ValueError, match=f"chunk = {chunk}: must be a"):
        CHUNKED[op](chunk=chunk)


def test_chunks_of_gla_are_powers_of_two():
    with pytest.raises(ValueError, match="chunk = 24: must be a power of two"):
        CHUNKED["gla"](chunk=24)


@pytest.mark.parametrize("kernels", ["xla", "reference", "mosaic_tpu"])
def test_groups_divide_heads(kernels):
    values, gates = jnp.zeros((1, 4, 3, 3)), jnp.zeros((1, 4, 3))
    for op in (
        partial(gated_recurrence.gated_recurrence, WIDE, WIDE, values, gates),
        partial(delta_rule.delta_rule, WIDE, WIDE, values, gates),
        partial(attention.attention, values, WIDE, WIDE),
    ):
        with pytest.raises(ValueError, match="keys of 2 groups for 3 heads: the groups must divide the heads"):
            op(kernels=kernels)
