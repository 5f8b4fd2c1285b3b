"""Where the time of a compiled program goes, by what its kernels are.

Times are the profiler's, of each instruction of the program; what an instruction is, which shape it writes and how many
bytes it reads and writes at least, the compiled text says.
"""

from __future__ import annotations

import math
import pathlib
import re
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pandas as pd
from jax.profiler import ProfileData

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(.*)$")
SHAPE = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
NAMED = re.compile(r"%([\w.\-]+)")


def profiled(compiled: Any, run: Callable[[], Any], calls: int = 3) -> pd.DataFrame:
    """Of a compiled program, which `run` calls once: a row for each instruction that took time on the device, with
    "kind" (product, kernel, copy, pass, other), "what" (the operation it is named after), "shape" (written), "times"
    (runs a call), "ms" (a call) and "gb" (read and written, at least), largest first."""
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                last = run()
            jax.block_until_ready(last)
        found = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))
        seconds = times(ProfileData.from_file(str(found[-1])))
    text = instructions(compiled.as_text())
    rows = []
    for name, (count, total) in seconds.items():
        said = text.get(name, {"kind": "other", "what": name, "shape": "", "gb": np.nan})
        if said["kind"] != "loop":  # whose time is that of what it holds
            rows.append(said | {"times": count / calls, "ms": 1e3 * total / calls})
    table = pd.DataFrame(rows, columns=["kind", "what", "shape", "times", "ms", "gb"])
    table["gb"] *= table["times"]
    together: Any = table.groupby(["kind", "what", "shape"], as_index=False, sort=False)[["times", "ms", "gb"]].sum()
    return together.sort_values("ms", ascending=False, ignore_index=True)


def times(data: Any) -> dict[str, tuple[int, float]]:
    """{instruction: (how often it ran, seconds of it all)}, of the device where there is one."""
    planes: list[Any] = list(data.planes)
    planes = [plane for plane in planes if plane.name.startswith("/device:")] or planes
    found: dict[str, tuple[int, float]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the profiler's own types, Python 3.12
        for event in (event for plane in planes for line in plane.lines for event in line.events):
            stats = dict(event.stats)
            if "hlo_op" in stats:
                count, total = found.get(stats["hlo_op"], (0, 0.0))
                found[stats["hlo_op"]] = (count + 1, total + 1e-9 * event.duration_ns)
    return found


def instructions(text: str) -> dict[str, dict[str, Any]]:
    """{instruction: {"kind", "what", "shape", "gb"}} of a compiled program's text."""
    lines = [match.groups() for match in map(INSTRUCTION.match, text.splitlines()) if match]
    sizes = {name: size(shape) for name, shape, *_ in lines}
    found = {}
    for name, shape, opcode, operands, rest in lines:
        read = sum(sizes.get(operand, 0) for operand in NAMED.findall(operands))
        source = re.search(r'op_name="([^"]*)"', rest)
        target = re.search(r'custom_call_target="([^"]*)"', rest)
        what = source.group(1).replace("eval_jaxpr/", "").removeprefix("jit(step)/") if source else opcode
        found[name] = {
            "kind": kind(name, opcode, what, target.group(1) if target else ""),
            "what": what,
            "shape": " ".join(f"{t}[{dims}]" for t, dims in SHAPE.findall(shape)[:3]),
            "gb": (read + sizes[name]) / 1e9,
        }
    return found


def kind(name: str, opcode: str, what: str, target: str) -> str:
    if opcode in ("while", "call", "conditional"):
        return "loop"
    if "gemm" in name or "gemm" in target or "cublas" in target or what.endswith("dot_general"):
        return "product"
    if opcode == "custom-call":
        return "kernel"
    return "copy" if opcode.startswith("copy") or "transpose" in name else "pass"


def size(shape: str) -> float:
    """Bytes of an array, or of a tuple of them."""
    return sum(BYTES.get(t, 4) * math.prod(int(d) for d in dims.split(",") if d) for t, dims in SHAPE.findall(shape))
