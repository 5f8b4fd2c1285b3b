"""`scalelab bench kernels` and `bench train` on a CPU: small shapes, the same columns."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import compat, dispatch
from scalelab import cli
from scalelab.bench import cases, kernels, profile, throughput


def test_the_list_names_every_operation_and_why(capsys):
    assert cli.main(["bench", "kernels", "--list"]) == 0
    out = capsys.readouterr().out
    for op in cases.OPS:
        assert op in out
    assert "splash: needs a TPU, this is a CPU" in out


def test_the_list_of_a_familys_training_step(capsys, monkeypatch):
    monkeypatch.setattr(dispatch, "device", lambda: dispatch.Device("gpu", "NVIDIA A100", "8.0"))
    command = ["bench", "kernels", "--list", "--families=mamba2,deltanet", "--params=1e5", "--rows=2", "--seq-len=32"]
    assert cli.main(command) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:] if line[:1].strip()]
    assert [row[:3] for row in rows] == [
        [family, op, "xla"]
        for family, own in (("mamba2", ("gated_recurrence", "gated_norm")), ("deltanet", ("delta_rule",)))
        for op in ("short_conv", *own, "cross_entropy")
    ]
    assert "needs compute capability 9.0 (Hopper), NVIDIA A100 has 8.0" in " ".join(rows[1])
    assert cli.main([*command, "--dtype=float16"]) == 2
    assert "float16" in capsys.readouterr().err


@pytest.mark.once
@pytest.mark.parametrize("case", cases.all_cases("cpu"), ids=lambda case: f"{case.op} {case.name}")
def test_the_plain_form_is_as_right_as_bfloat16_lets_it_be(case):
    error, gradient_error = kernels.errors(case, "xla")
    assert error < 6e-3
    assert gradient_error < 1.2e-2


def test_what_no_device_has_run_yet_is_measured_where_it_can_be(monkeypatch):
    if not compat.MOSAIC_GPU:
        pytest.skip(f"Mosaic GPU needs JAX {compat.MOSAIC_GPU_SINCE}")
    monkeypatch.setattr(dispatch, "device", lambda: dispatch.Device("gpu", "NVIDIA H100", "9.0"))
    monkeypatch.setattr(dispatch, "UNMEASURED", {("gla", "mosaic_gpu")})
    for op in ("gla", "gated_recurrence"):
        case = next(case for case in cases.all_cases("gpu") if case.op == op)
        assert list(kernels.runnable(case)) == ["xla", "mosaic_gpu"]
    assert kernels.choices(case)[case.op].implementation == "mosaic_gpu"
    monkeypatch.setattr(
        dispatch, "UNMEASURED", {("delta_chunks", "mosaic_gpu")}
    )  # a part of an operation that has been
    case = next(case for case in cases.all_cases("gpu") if case.op == "delta_rule")
    assert list(kernels.runnable(case)) == ["xla", "mosaic_gpu", "auto"]
    assert kernels.choices(case)["delta_chunks"].implementation == "xla"


def test_a_row_of_measurements(capsys):
    assert cli.main(["bench", "kernels", "--ops=cross_entropy"]) == 0
    said = capsys.readouterr()
    rows = [line.split() for line in said.out.splitlines() if line.startswith("cross_entropy")]
    assert [row[4] for row in rows] == ["reference", "xla"]
    assert rows[0][8] == rows[0][12] == "1.00"  # over itself
    for row, line in zip(rows, said.err.splitlines(), strict=True):  # each as it is measured
        assert f"{row[4]}: errors {row[5]}, {row[6]}; {row[7]} and {row[10]} ms (range {row[11]}" in " ".join(
            line.split()
        )


def test_what_is_wrong_or_fails_is_marked_and_ends_with_1(capsys, monkeypatch):
    def run(kernels):
        if kernels == "splash":
            raise ValueError("no such thing, " * 20)
        return lambda x: jnp.where(kernels == "auto", jnp.nan, 2.0) * x

    x = cases.Input((4, 8), jnp.float32, cases.normal())
    case = cases.Case("gla", "B4", 4, lambda rows: [x], run, 64.0, baseline="reference")
    monkeypatch.setattr(kernels, "runnable", lambda case: ["reference", "splash", "auto"])
    monkeypatch.setattr(cases, "all_cases", lambda platform, dtype: [case])
    assert cli.main(["bench", "kernels"]) == 1
    out = capsys.readouterr().out
    assert [line.split()[2] for line in out.splitlines() if line.startswith("gla")] == ["reference", "splash", "auto"]
    assert "nan wrong" in out
    assert "failed: gla B4, splash: no such thing" in out
    assert "…" not in out


def test_torch_is_timed_in_bfloat16_alone(capsys):
    assert cli.main(["bench", "kernels", "--torch", "--dtype=float32"]) == 2
    assert "--dtype = 'float32': must be bfloat16 beside --torch" in capsys.readouterr().err


def test_bad_input(capsys):
    assert cli.main(["bench", "kernels", "--ops=atention"]) == 2
    assert "--ops = 'atention': must be of attention" in capsys.readouterr().err
    assert cli.main(["bench", "kernels", "--dtype=bf16"]) == 2
    assert "--dtype" in capsys.readouterr().err
    assert cli.main(["bench", "train", "--families=tranformer", "--rows=1", "--seq-len=64"]) == 2
    assert "tranformer" in capsys.readouterr().err
    assert cli.main(["bench", "train", "--kernels=fast", "--rows=1", "--seq-len=64"]) == 2
    assert "fast" in capsys.readouterr().err


@pytest.mark.parametrize(("said", "note"), [("", "MemoryError"), ("\n", "MemoryError"), ("full\nof it", "full")])
def test_one_that_fails_is_a_row(said, note, monkeypatch):
    def fails(*_, **__):
        raise MemoryError(said)

    monkeypatch.setattr(throughput, "median_seconds", fails)
    monkeypatch.setattr(kernels, "median_seconds", fails)
    assert throughput.measured("transformer", "xla", 5e3, rows=2, seq_len=32, packed=False).note == note
    case = next(case for case in cases.all_cases("cpu") if case.op == "cross_entropy")
    assert kernels.measured(case, "xla", (1.0, 1.0)).note == note


def test_utilisation_of_a_small_model(capsys):
    row = throughput.measured("transformer", "xla", 5e3, rows=2, seq_len=32, packed=False)
    assert row.note == ""
    assert row.seconds > 0
    throughput.report([row], peak=2 * row.flops / row.seconds)
    out = capsys.readouterr().out
    assert "50.0%" in out
    assert "plain XLA" not in out


def test_what_fell_back_is_named(capsys, monkeypatch):
    monkeypatch.setattr(dispatch, "device", lambda: dispatch.Device("gpu", "NVIDIA A100", "8.0"))
    row = throughput.measured("lightning", "auto", 5e3, rows=2, seq_len=32, packed=False)
    assert row.plain == ("gated_recurrence",)
    assert throughput.line(row, peak=1e12).endswith("; plain XLA: gated_recurrence")
    throughput.report([row], peak=1e12)
    assert "gated_recurrence" in capsys.readouterr().out


def test_a_profile_counts_times_and_bytes():
    """Of a product in a loop of three, and a pass."""
    w = jnp.ones((64, 64))

    def program(x):
        x, _ = jax.lax.scan(lambda x, _: (x @ w, None), x, length=3)
        return jnp.sort(x, axis=0)

    x = jnp.ones((32, 64))
    compiled = jax.jit(program).lower(x).compile()
    products = [said for said in profile.instructions(compiled.as_text()).values() if said["kind"] == "product"]
    assert products
    assert max(said["gb"] for said in products) == pytest.approx(4 * (2 * 32 * 64 + 64 * 64) / 1e9)
    found = profile.profiled(compiled, lambda: compiled(x))
    assert list(found.columns) == ["kind", "what", "shape", "times", "ms", "gb"]
    assert found["ms"].is_monotonic_decreasing
    assert (found["ms"] >= 0).all()
    assert "loop" not in set(found["kind"])
    (ran,) = found[found["kind"] == "product"]["times"]
    assert ran == 3
    assert (found[found["what"].str.endswith("sort")]["times"] == 1).all()


def test_a_profile_says_where_a_steps_time_goes(capsys):
    throughput.breakdown("transformer", "xla", 5e3, rows=2, seq_len=32, packed=False, shown=4)
    said = capsys.readouterr().out
    assert said.startswith("transformer (xla), ms a step: ")
    assert len(said.strip().splitlines()) == 2 + 4
