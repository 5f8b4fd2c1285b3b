"""The delta rule on Hopper."""

from functools import partial

from pallas_kernels.chunk_walk import gpu
from pallas_kernels.delta_rule import gpu_chunks, sweeps

delta_rule = partial(sweeps.delta_rule, gpu.FORM, gpu_chunks)
# keys: beside a wider state, addresses of shared memory spill from the registers
refusal = partial(gpu.refusal, widest=192)
