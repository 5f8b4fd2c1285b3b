"""Which implementation is chosen, what is said of it, and that a fallback on an accelerator is said once."""

import warnings

import pytest

from pallas_kernels import compat, dispatch
from pallas_kernels.dispatch import Choice, Device, explain

HOPPER = Device("gpu", "NVIDIA H100", "9.0")
AMPERE = Device("gpu", "NVIDIA A100", "8.0")
CPU = Device("cpu", "cpu")


def forms(refused=""):
    return {"mosaic_gpu": lambda: refused, "mosaic_tpu": lambda: ""}


def test_the_first_form_of_the_device_that_takes_the_arguments():
    assert explain("auto", forms(), Device("tpu", "TPU v5")) == Choice(
        "mosaic_tpu", (("mosaic_gpu", "needs a GPU, this is a TPU"),)
    )
    assert explain("auto", forms("odd"), CPU).implementation == "xla"
    ampere = explain("auto", forms(), AMPERE)
    assert ampere.implementation == "xla"
    assert "capability 9.0 (Hopper), NVIDIA A100 has 8.0" in ampere.passed_over[0][1]
    hopper = explain("auto", forms(), HOPPER)
    assert hopper.implementation == ("mosaic_gpu" if compat.MOSAIC_GPU else "xla")
    assert explain("auto", forms("takes widths of 64"), HOPPER).implementation == "xla"


def test_named_implementations():
    assert explain("xla", forms(), HOPPER) == Choice("xla", ())
    assert explain("reference", forms(), HOPPER) == Choice("reference", ())
    assert explain("mosaic_gpu", forms(), CPU) == Choice("mosaic_gpu", ())
    assert explain("cudnn", forms(), CPU).implementation == "xla"  # not a form of this operation
    with pytest.raises(dispatch.Unsupported, match="takes widths of 64"):
        explain("mosaic_gpu", forms("takes widths of 64"), CPU)
    with pytest.raises(ValueError, match="kernels = 'triton': must be one of auto, xla, reference"):
        explain("triton", forms(), CPU)


def test_a_form_that_no_device_has_run_is_left_to_those_who_name_it(monkeypatch):
    monkeypatch.setattr(compat, "MOSAIC_GPU", True)
    monkeypatch.setattr(dispatch, "UNMEASURED", {("new", "mosaic_gpu")})
    assert explain("auto", forms(), HOPPER, "new") == Choice("xla", (
        ("mosaic_gpu", dispatch.NOT_MEASURED), ("mosaic_tpu", "needs a TPU, this is a GPU"),
    ))  # fmt: skip
    assert explain("auto", forms("takes widths of 64"), HOPPER, "new").passed_over[0][1] == "takes widths of 64"
    assert explain("mosaic_gpu", forms(), HOPPER, "new").implementation == "mosaic_gpu"
    assert explain("auto", forms(), HOPPER, "old").implementation == "mosaic_gpu"
    monkeypatch.setattr(dispatch, "device", lambda: HOPPER)
    with pytest.warns(dispatch.Fallback, match="new runs as plain XLA.*mosaic_gpu: has not been measured on a device"):
        assert dispatch.choose("new", "auto", forms()) == "xla"


def test_a_fallback_on_an_accelerator_warns_once_with_its_reason(monkeypatch):
    monkeypatch.setattr(dispatch, "device", lambda: AMPERE)
    with pytest.warns(dispatch.Fallback, match=r"op one runs as plain XLA.*mosaic_gpu: needs compute capability 9.0"):
        assert dispatch.choose("op one", "auto", forms()) == "xla"
    with pytest.warns(dispatch.Fallback, match="it has no form for a GPU yet"):
        assert dispatch.choose("op two", "auto", {}) == "xla"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose("op one", "auto", forms()) == "xla"  # said before
        assert dispatch.choose("op three", "xla", forms()) == "xla"  # asked for
        assert dispatch.choose("op four", "auto", {}, plain_is_fast=True) == "xla"
        with dispatch.listening() as heard:
            dispatch.choose("op five", "auto", forms())
        assert [op for op, _ in heard] == ["op five"]


def test_nothing_is_said_on_a_cpu(monkeypatch):
    monkeypatch.setattr(dispatch, "device", lambda: CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose("op six", "auto", forms()) == "xla"
