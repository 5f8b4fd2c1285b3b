"""Optimizer and learning-rate schedules.

The learning rate is an argument of the compiled step, not a constant in it: runs that differ in schedule, length or
peak share one compilation, and a population can be trained under vmap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import optax

from scalelab.schema import Config


def schedule(optim: Config, steps: int) -> Callable[[int], float]:
    """Learning rate of update 0 .. steps - 1.

    Warm-up is linear and its first update is not zero. `cosine` falls to `final_lr` times the peak at the last
    update. `wsd` stays at the peak until the cooldown, which is linear (Hägele et al. 2024): two runs that differ
    in the length of the cooldown alone agree up to where the earlier one begins.
    """
    peak, final = optim.lr, optim.lr * optim.final_lr
    warmup = round(optim.warmup * steps)
    cooldown = round(optim.cooldown * steps)

    def rate(update: int) -> float:
        if update < warmup:
            return peak * (update + 1) / warmup
        if optim.schedule == "cosine":
            share = (update - warmup) / max(steps - 1 - warmup, 1)
            return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * share))
        if optim.schedule == "wsd" and update >= steps - cooldown:
            return peak + (final - peak) * (update + 1 - (steps - cooldown)) / cooldown
        return peak

    return rate


def optimizer(optim: Config, decay_mask: Any, rules: Any = None) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) after clipping by the global norm; decay where the mask is true.

    Its updates are for a learning rate of -1: the step multiplies them by minus the rate. `rules`: what multiplies the
    learning rate, decay and eps of each tensor (`parametrization.Rule`), in a tree like the mask's; None: nothing.
    """
    adam = optax.scale_by_adam(b1=optim.beta1, b2=optim.beta2, eps=optim.eps)
    if rules is None:
        parts = [adam, optax.add_decayed_weights(optim.weight_decay, decay_mask)]
    else:
        decay = jax.tree.map(lambda rule, on: optim.weight_decay * rule.decay if on else 0.0, rules, decay_mask)
        parts = [
            # Adam divides by sqrt(v) + eps: with gradients times 1 / c its eps is c eps.
            optax.stateless(lambda g, _: jax.tree.map(lambda rule, g: g / rule.eps, rules, g)),
            adam,
            optax.stateless(lambda u, p: jax.tree.map(lambda d, u, p: u + d * p if d else u, decay, u, p)),
            optax.stateless(lambda u, _: jax.tree.map(lambda rule, u: rule.lr * u, rules, u)),
        ]
    return optax.chain(*([optax.clip_by_global_norm(optim.clip)] if optim.clip else []), *parts)
