"""The recurrence on Hopper."""

from __future__ import annotations

from functools import partial

from jaxtyping import Array

from pallas_kernels.slstm import recurrence
from pallas_kernels.slstm.kernels import ROWS, backward, forward

WIDTHS = (64, 128, 192)  # of a head
FORM = recurrence.Form(forward, backward, rows=lambda B: ROWS, side=-1, unit=WIDTHS[0])
slstm = partial(recurrence.slstm, FORM)


def refusal(gates: Array) -> str:
    """Why the kernels do not take these arguments; "" where they do."""
    d = gates.shape[-1]
    return "" if d in WIDTHS else f"takes heads of width {', '.join(map(str, WIDTHS))}, not {d}"
