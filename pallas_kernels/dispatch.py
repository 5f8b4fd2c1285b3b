"""Which implementation of an operation runs here, and why not a faster one.

Every operation has the plain form `xla`, which runs anywhere, and `reference`, for tests; some have forms for one kind
of device (`DEVICES`). `kernels` says which to take:

    "auto"        the first form for this device that takes the arguments, but those of `UNMEASURED`; else `xla`, and a
                  warning with the reason, once, unless the device is a CPU, whose best form it is
    "xla"         the plain form
    "reference"   the definition
    another name  that form, whatever the device; an error where it does not take the arguments. Operations that have
                  no form of that name choose as under "auto".
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

DEVICES = {"mosaic_gpu": "gpu", "cudnn": "gpu", "mosaic_tpu": "tpu", "splash": "tpu"}
KERNELS = ("auto", "xla", "reference", *DEVICES)  # what `kernels` may be
MODULES = {"mosaic_gpu": "gpu", "mosaic_tpu": "tpu"}  # of an operation's folder, that hold these forms
# (operation, form) that was interpreted and compiled, but never ran on a device
RECURRENCES = ("delta_rule", "gated_recurrence", "gla", "mlstm", "selective_scan", "slstm")
UNMEASURED = {(op, "mosaic_tpu") for op in RECURRENCES}
NOT_MEASURED = "has not been measured on a device yet: name it to use it"

Refusal = Callable[[], str]  # why the form does not take these arguments; "" where it does


class Fallback(UserWarning):
    """A slower implementation runs on an accelerator, for the reason given."""


class Unsupported(ValueError):
    """The implementation asked for by name does not take these arguments."""


@dataclasses.dataclass(frozen=True)
class Device:
    platform: str  # cpu | gpu | tpu
    kind: str  # as the maker calls it
    capability: str = ""  # of an NVIDIA GPU, such as "9.0"


@dataclasses.dataclass(frozen=True)
class Choice:
    implementation: str
    passed_over: tuple[tuple[str, str], ...]  # (a form that may be faster, why it does not run)


def explain(kernels: str, forms: Mapping[str, Refusal], on: Device | None = None, op: str = "") -> Choice:
    """The choice among `forms` of `op`, fastest first, beside `xla` and `reference`. Raises `ValueError` for an unknown
    name, `Unsupported` where a form named by the caller does not take the arguments."""
    if kernels not in KERNELS:
        raise ValueError(f"kernels = {kernels!r}: must be one of {', '.join(KERNELS)}")
    if kernels in ("xla", "reference"):
        return Choice(kernels, ())
    if kernels in forms:
        if reason := forms[kernels]():
            raise Unsupported(reason)
        return Choice(kernels, ())
    on = on or device()
    passed_over = []
    for name, refusal in forms.items():
        reason = lacking(name, on) or refusal() or (NOT_MEASURED if (op, name) in UNMEASURED else "")
        if not reason:
            return Choice(name, tuple(passed_over))
        passed_over.append((name, reason))
    return Choice("xla", tuple(passed_over))


def lacking(name: str, on: Device | None = None) -> str:
    """Why a device (the default one) cannot run a form at all; "" where it can."""
    on = on or device()
    if name in DEVICES and DEVICES[name] != on.platform:
        return f"needs a {DEVICES[name].upper()}, this is a {on.platform.upper()}"
    return _hopper(on) if name == "mosaic_gpu" else ""


def form(op: str, name: str) -> Any:
    """The module of an operation's form, imported only here: it brings Pallas, and may need a newer JAX."""
    return importlib.import_module(f"pallas_kernels.{op}.{MODULES[name]}")


def refusals(op: str, *arguments: Any) -> dict[str, Refusal]:
    """An operation's forms, each with what its own `refusal` says of the arguments."""

    def refusal(name: str) -> str:
        from pallas_kernels import compat  # brings JAX

        lacking = compat.without_mosaic_gpu() if name == "mosaic_gpu" else ""
        return lacking or form(op, name).refusal(*arguments)

    return {name: functools.partial(refusal, name) for name in MODULES}


def choose(op: str, kernels: str, forms: Mapping[str, Refusal], plain_is_fast: bool = False) -> str:
    """The name of the implementation that `op` is to run; see the module. Warns of a fallback on an accelerator, but
    where the plain form is as fast as any."""
    on = device()
    try:
        choice = explain(kernels, forms, on, op)
    except Unsupported as refused:
        raise Unsupported(f"{op}: kernels = {kernels!r} does not run: {refused}") from None
    if (heard := _HEARD.get()) is not None:
        heard.append((op, choice))
    elif choice.implementation == "xla" and kernels != "xla" and on.platform != "cpu" and not plain_is_fast:
        own = [f"{name}: {reason}" for name, reason in choice.passed_over if DEVICES[name] == on.platform]
        _warn_once(op, "; ".join(own) or f"it has no form for a {on.platform.upper()} yet")
    return choice.implementation


@functools.cache
def _warn_once(op: str, reason: str) -> None:
    warnings.warn(f"{op} runs as plain XLA, not at the device's speed ({reason})", Fallback, stacklevel=4)


@functools.cache
def device() -> Device:
    """The default device."""
    import jax  # not above: configs are read without JAX

    first = jax.devices()[0]
    platform = "gpu" if first.platform in ("cuda", "rocm") else str(first.platform)
    return Device(platform, first.device_kind, str(getattr(first, "compute_capability", "")))


def _hopper(on: Device) -> str:
    """Why Mosaic GPU kernels, which are built on Hopper's wgmma and TMA, do not run on a device."""
    from pallas_kernels import compat  # brings JAX

    if on.capability != "9.0":
        return f"needs compute capability 9.0 (Hopper), {on.kind} has {on.capability or 'none'}"
    return compat.without_mosaic_gpu()


_HEARD: contextvars.ContextVar[list[tuple[str, Choice]] | None] = contextvars.ContextVar("heard", default=None)


@contextlib.contextmanager
def listening() -> Iterator[list[tuple[str, Choice]]]:
    """What is chosen while operations are traced inside, in order; nothing is warned of."""
    token = _HEARD.set(heard := [])
    try:
        yield heard
    finally:
        _HEARD.reset(token)


# ------------------------------------------------------------------------------------ interpretation, for tests

_INTERPRETED = contextvars.ContextVar("interpreted", default=False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels traced inside run as their interpreters run them, on any device: slow, and exact."""
    token = _INTERPRETED.set(True)
    try:
        yield
    finally:
        _INTERPRETED.reset(token)


def interpret() -> bool:
    """Whether kernels are to be interpreted."""
    return _INTERPRETED.get()
