"""GLA on TPUs."""

from functools import partial

from pallas_kernels.chunk_walk import tpu
from pallas_kernels.gla import sweeps

gla = partial(sweeps.gla, tpu.FORM, None)
refusal = partial(tpu.refusal, erases=False)
