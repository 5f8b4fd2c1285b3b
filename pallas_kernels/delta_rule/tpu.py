"""The delta rule on TPUs."""

from functools import partial

from pallas_kernels.chunk_walk import tpu
from pallas_kernels.delta_rule import sweeps

delta_rule = partial(sweeps.delta_rule, tpu.FORM, None)
refusal = partial(tpu.refusal, erases=True)
