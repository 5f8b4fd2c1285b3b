"""Optimizer and learning-rate schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def schedule(optim: ConfigDict, steps: int) -> Callable[[Any], Any]:
    """Learning rate at update 0 .. steps - 1, as a function of the update's number.

    Warm-up is linear and its first update is not zero. `cosine` falls to `final_lr` times the peak at the last
    update. `wsd` stays at the peak until the cooldown, which is linear (Hägele et al. 2024): two runs that differ
    in the length of the cooldown alone agree up to where the earlier one begins.
    """
    peak, final = optim.lr, optim.lr * optim.final_lr
    warmup = round(optim.warmup * steps)
    cooldown = round(optim.cooldown * steps)

    def rate(count: Any) -> Any:
        count = jnp.asarray(count, jnp.float32)
        rising = peak * (count + 1) / max(warmup, 1)
        if optim.schedule == "cosine":
            share = jnp.clip((count - warmup) / max(steps - 1 - warmup, 1), 0, 1)
            falling = final + (peak - final) * 0.5 * (1 + jnp.cos(jnp.pi * share))
        elif optim.schedule == "wsd":
            share = jnp.clip((count + 1 - (steps - cooldown)) / max(cooldown, 1), 0, 1)
            falling = peak + (final - peak) * share
        else:
            falling = jnp.full_like(count, peak)
        return jnp.where(count < warmup, rising, falling)

    return rate


def optimizer(optim: ConfigDict, steps: int, decay_mask: Any) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) after clipping by the global norm; decay where the mask is true."""
    adamw = optax.adamw(
        schedule(optim, steps),
        b1=optim.beta1,
        b2=optim.beta2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        mask=decay_mask,
    )
    return optax.chain(optax.clip_by_global_norm(optim.clip), adamw) if optim.clip else adamw
