"""The cell on TPUs."""

from functools import partial

from pallas_kernels.gated_recurrence.tpu import FORM, refusal
from pallas_kernels.mlstm import sweeps

__all__ = ["mlstm", "refusal"]
mlstm = partial(sweeps.mlstm, FORM)
