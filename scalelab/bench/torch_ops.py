"""PyTorch's operations at given shapes, timed; run by `scalelab bench kernels --torch`."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

# Untyped: `_grouped_mm` is private there, and type checks run with and without PyTorch.
torch: Any = importlib.import_module("torch")


def main(asked: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    print(json.dumps([globals()[case.pop("op")](**case) for case in asked]))


def grouped_matmul(sizes: list[int], K: int, N: int) -> dict[str, Any]:
    x = normal(sum(sizes), K)
    w = normal(len(sizes), K, N) * K**-0.5
    ends = torch.tensor(np.cumsum(sizes), dtype=torch.int32, device="cuda")
    return {"torch._grouped_mm": times(lambda x, w: torch._grouped_mm(x, w, offs=ends), x, w)}


def attention(B: int, T: int, H: int, d: int) -> dict[str, Any]:
    nn = importlib.import_module("torch.nn.attention")

    arrays = [normal(B, H, T, d) for _ in range(3)]
    run = torch.nn.functional.scaled_dot_product_attention
    found = {}
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
        with nn.sdpa_kernel(getattr(nn.SDPBackend, name)):
            found[f"torch {name.split('_')[0].lower()}"] = times(lambda q, k, v: run(q, k, v, is_causal=True), *arrays)
    return found


def normal(*shape: int) -> Any:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def times(run: Callable[..., Any], *arrays: Any) -> dict[str, float]:
    with torch.no_grad():
        cotangent = torch.randn_like(run(*arrays))
        forward, _ = median_seconds(lambda: run(*arrays))
    wanted = [a.detach().requires_grad_() for a in arrays]

    def both() -> None:
        torch.autograd.grad(run(*wanted), wanted, cotangent)

    seconds, spread = median_seconds(both)
    return {"forward": forward, "both": seconds, "spread": spread}


def median_seconds(run: Callable[[], Any], rounds: int = 9, least: float = 0.03) -> tuple[float, float]:
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    calls = max(1, round(least / (time.perf_counter() - began)))
    seen = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
        seen.append((time.perf_counter() - began) / calls)
    return float(np.median(seen)), float(np.ptp(seen))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
