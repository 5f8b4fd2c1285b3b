"""What differs between the versions of JAX that are supported. Nothing else asks for a version."""

from __future__ import annotations

from typing import Any

import jax

MOSAIC_GPU_SINCE = "0.11"
MOSAIC_GPU = jax.__version_info__ >= (0, 11)  # the kernels here are written against its API of that version


def without_mosaic_gpu() -> str:
    """Why Mosaic GPU kernels do not run here, whatever the device; "" where they do."""
    return "" if MOSAIC_GPU else f"needs JAX {MOSAIC_GPU_SINCE} or later"


def gpu_interpreter(**options: Any) -> Any:
    """What makes a Mosaic GPU kernel run on any device; JAX has it since the version above."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams(**options)  # pyright: ignore[reportAttributeAccessIssue]


def tpu_interpreter(**options: Any) -> Any:
    """What makes a Mosaic TPU kernel run on any device."""
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.InterpretParams(**options)


def gpu_load(ref: Any, layout: Any = None) -> Any:
    """What a Mosaic GPU reference holds, in a layout, by whatever accesses that takes."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.load(ref, layout=layout, optimized=False)  # pyright: ignore[reportCallIssue]


def gpu_store(ref: Any, value: Any) -> None:
    """Into a Mosaic GPU reference, by whatever accesses that takes."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if store := getattr(plgpu, "store", None):  # since JAX 0.12, where a plain assignment refuses narrow ones
        store(ref, value, optimized=False)
    else:
        ref[...] = value
