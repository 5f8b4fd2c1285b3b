"""A training step of `transformers`' Llama in PyTorch, timed; run by `scalelab bench train --torch`."""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

import numpy as np


def main(shape: dict[str, int]) -> None:
    # Both untyped: their stubs disagree with what they accept, and type checks run with and without them.
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")

    torch.set_float32_matmul_precision("high")
    config = transformers.LlamaConfig(
        vocab_size=shape["vocabulary"], hidden_size=shape["width"], intermediate_size=shape["hidden"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_dim"], max_position_embeddings=shape["seq_len"], tie_word_embeddings=bool(shape["tied"]),
        attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.LlamaForCausalLM(config).to(device)
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    tokens = torch.randint(1, shape["vocabulary"], (shape["rows"], shape["seq_len"]), device=device)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = compiled(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(3):
        step()
    wait()
    began = time.perf_counter()
    step()
    wait()
    calls = max(1, round(shape["round"] / (time.perf_counter() - began)))
    times = []
    for _ in range(7):
        began = time.perf_counter()
        for _ in range(calls):
            step()
        wait()
        times.append((time.perf_counter() - began) / calls)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    print(json.dumps({"seconds": float(np.median(times)), "spread": float(np.ptp(times)), "memory": memory}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
