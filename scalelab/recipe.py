"""Recipes: a target size -> shape, learning rate and batch, as dotted overrides of a config.

Starting points, not laws: a study that is to be believed tunes them at each scale, or shows that it need not.
"""

from __future__ import annotations

import math
from typing import Any

from scalelab.errors import BadInput


def transformer_shape(width: int) -> dict[str, Any]:
    """Shape of a SwiGLU Transformer of a width: one layer per 64 of width (at least 2), F = 8/3 D."""
    head_dim = 64 if width % 64 == 0 and width >= 256 else next(d for d in (32, 16, 8) if width % d == 0)
    grain = 64 if width >= 256 else 16
    heads = width // head_dim
    return {
        "model.width": width,
        "model.layers": max(2, round(width / 64)),
        "model.attention.heads": heads,
        "model.attention.kv_heads": heads,
        "model.attention.head_dim": head_dim,
        "model.mlp.hidden": math.ceil(8 * width / 3 / grain) * grain,
    }


def transformer_params(shape: dict[str, Any]) -> int:
    """Non-embedding parameters of such a shape: attention 4 D^2 and SwiGLU 3 D F a layer, norms (2 L + 1) D."""
    width, layers, hidden = shape["model.width"], shape["model.layers"], shape["model.mlp.hidden"]
    return layers * (4 * width**2 + 3 * width * hidden) + (2 * layers + 1) * width


def transformer(params: float) -> dict[str, Any]:
    """The shape whose non-embedding parameters come nearest to `params` (in ratio), and a learning rate for it.

    Widths are multiples of 8 up to 64, of 16 up to 256, of 64 above. Raises `BadInput` beyond them.
    """
    widths = [*range(16, 64, 8), *range(64, 256, 16), *range(256, 16385, 64)]
    smallest, largest = (transformer_params(transformer_shape(width)) for width in (widths[0], widths[-1]))
    if params < smallest / 2:
        raise BadInput("params", params, f"the smallest Transformer of the recipe has {smallest} parameters")
    if params > largest * 2:
        raise BadInput("params", params, f"the largest Transformer of the recipe has {largest:.3g} parameters")
    shape = min(map(transformer_shape, widths), key=lambda s: abs(math.log(transformer_params(s) / params)))
    return {**shape, "optim.lr": learning_rate(shape["model.width"])}


def learning_rate(width: int) -> float:
    """Peak AdamW learning rate: 0.5 / width, at most 0.02.

    Measured at widths 24, 40 and 64 (bytes of Python source, 2e11 FLOP, 512 tokens a batch, fan-in initialisation): the
    best of a grid of factors 2 was 0.013 to 0.026, 0.010 to 0.020 and 0.008. At 768 the rule gives the usual 6.5e-4.
    """
    return float(f"{min(0.02, 0.5 / width):.3g}")
