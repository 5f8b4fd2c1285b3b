"""GLA on Hopper."""

from functools import partial

from pallas_kernels.chunk_walk import gpu
from pallas_kernels.gla import gpu_chunks, sweeps

gla = partial(sweeps.gla, gpu.FORM, gpu_chunks)
refusal = partial(gpu.refusal, widest=256)  # keys: the state takes half of a thread's registers
