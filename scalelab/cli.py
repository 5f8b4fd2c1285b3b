"""The command line. Heavy imports happen inside the commands, so that `--help` and errors are quick.

Exit status: 0 done, 1 some run failed, 2 bad input, 75 stopped by SIGTERM and resumable.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from scalelab import flags
from scalelab.errors import BadInput, FeatureMissing

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, flags.BAD_INPUT, 75


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args, rest = flags.parser(argv).parse_known_args(argv)
    args.argv = argv
    try:
        args.overrides = _overrides(rest)
        if args.overrides and getattr(args, "config", None) is None:
            raise BadInput("command line", rest[0], "needs --config")
        return globals()[f"_{args.command}"](args)
    except (BadInput, FeatureMissing) as error:
        print(f"scalelab: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:  # `scalelab ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains as it flushes at its end
        return DONE
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if type(error).__name__ == "Stopped":  # scalelab.train's, without importing it here
            print(f"scalelab: {error}", file=sys.stderr)
            return STOPPED
        traceback.print_exc()
        print(f"scalelab: failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return FAILED


def _overrides(rest: Sequence[str]) -> dict[str, str]:
    """`--config.a.b=value` or `--config.a.b value` -> {"a.b": "value"}."""
    found: dict[str, str] = {}
    items = iter(rest)
    for item in items:
        match = re.fullmatch(r"--config\.([\w.]+)(?:=(.*))?", item, re.DOTALL)
        if match is None:
            raise BadInput(
                "command line", item, "not an option here; fields of the config are --config.section.field=value"
            )
        value = match[2] if match[2] is not None else next(items, None)
        if value is None:
            raise BadInput(item, None, "needs a value")
        found[match[1]] = value
    return found


def _root(args: argparse.Namespace, config: Any) -> pathlib.Path:
    return pathlib.Path(args.runs or config.runs)


def _expand(args: argparse.Namespace, name: str = "") -> tuple[Any, pathlib.Path]:
    from scalelab import sweep

    command = "scalelab " + shlex.join(args.argv)
    found = sweep.expand(args.config, args.overrides, command, name)
    return found, _root(args, found.runs[0].spec.config)


# ------------------------------------------------------------------------------------------------ commands


def _plan(args: argparse.Namespace) -> int:
    from scalelab import laws_command, tables

    if (args.source is None) == (args.config is None):
        raise BadInput("command line", args.argv[1:], "needs either --config or --from")
    if args.source is not None:
        laws_command.plan(args)
        return DONE
    for flag in ("flops", "target", "out", "seed", "cost", "others"):
        if getattr(args, flag) not in (None, []):
            raise BadInput(f"--{'with' if flag == 'others' else flag}", getattr(args, flag), "goes with --from")
    sweep, root = _expand(args)
    tables.plan(sweep, root)
    return DONE


def _stoppable() -> None:
    """From here on SIGTERM means: resumable. The loops put their own handlers in its place while they run.

    The process ends at once, as under kill -9, which no file minds: an exception could come up in a destructor or a
    callback, where Python prints it and goes on.
    """

    def stop(number: int, frame: Any) -> NoReturn:
        os.write(2, b"scalelab: stopped outside of training; the same command resumes it\n")
        os._exit(STOPPED)

    signal.signal(signal.SIGTERM, stop)


def _train(args: argparse.Namespace) -> int:
    _stoppable()
    from scalelab import config, host, sweep, tables, track, train

    if args.parent is not None:
        from scalelab.launch import worker

        host.end_with(args.parent)
        worker.serve(sys.stdin)
        return DONE
    if (args.spec is None) == (args.config is None):
        raise BadInput("command line", args.argv[1:], "needs either --config or --spec")
    if args.spec is not None:
        if args.runs is not None:
            raise BadInput("--runs", args.runs, "goes with --config; a --spec is trained in its own folder")
        path = pathlib.Path(args.spec)
        spec = config.RunSpec.load(path)
        root = path.parent.parent
    else:
        spec = sweep.plan(config.load(args.config, args.overrides)).spec
        root = _root(args, spec.config)
    bar = [] if args.quiet else [track.ProgressBar(spec.config.train.steps, spec.id)]
    record = train.run(spec, root, bar)
    if not args.quiet:
        tables.record(record, root / spec.id)
    return DONE


def _sweep(args: argparse.Namespace) -> int:
    _stoppable()
    from scalelab import tables
    from scalelab.launch import local

    if args.jobs < 1:
        raise BadInput("--jobs", args.jobs, "must be at least 1")
    sweep, root = _expand(args, args.name)
    path = sweep.save(root)
    tables.plan(sweep, root)
    # The longest first, so that the workers end together: by FLOPs, and among equals those of many small steps.
    longest = sorted(sweep.runs, key=lambda run: (-float(f"{run.flops:.1g}"), -run.steps))
    outcome = local.run_all(root, [run.spec.id for run in longest], args.jobs)
    tables.outcome(outcome, path)
    return FAILED if outcome.failed else STOPPED if outcome.stopped else DONE


def _status(args: argparse.Namespace) -> int:
    from scalelab import tables

    tables.status(pathlib.Path(args.path))
    return DONE


def _fit(args: argparse.Namespace) -> int:
    from scalelab import laws_command

    laws_command.fit(args)
    return DONE


def _compare(args: argparse.Namespace) -> int:
    from scalelab import laws_command

    laws_command.compare(args)
    return DONE


def _report(args: argparse.Namespace) -> int:
    from scalelab import laws_command, records, report, report_fits, report_terminal

    table = laws_command.table_of(args.path)
    kept = table[table["status"] == "done"]
    found = report_fits.fitted(table, args.bootstrap)
    report_terminal.terminal(found.fits, found.isoflop, comparison=found.comparison)
    path = report.write(
        args.out, kept, records.curves(args.path), found.fits, found.isoflop, comparison=found.comparison,
        title=args.title, command="scalelab " + shlex.join(args.argv), notes=found.notes,
    )  # fmt: skip
    print(f"report: {path}")
    return DONE


def _sample(args: argparse.Namespace) -> int:
    from scalelab import sample

    for piece in sample.text(pathlib.Path(args.run), args.prompt, args.tokens, args.temperature, args.seed):
        print(piece, end="", flush=True)
    print()
    return DONE


def _eval(args: argparse.Namespace) -> int:
    from scalelab import scoring, tables

    contexts = _numbers("--context", args.context)
    folders = scoring.finished(args.run)
    plan = scoring.plan(_list(args.data), contexts, _list(args.tasks))
    for folder in folders:
        tables.evaluations(folder.name, scoring.score(folder, plan))
    return DONE


def _probe(args: argparse.Namespace) -> int:
    _stoppable()
    from scalelab import model_plots, probe, records, tables
    from scalelab.launch import local
    from scalelab.paths import check_figure

    if args.jobs < 1:
        raise BadInput("--jobs", args.jobs, "must be at least 1")
    if args.out:
        check_figure(args.out, "--out")
    if "," in args.task:
        raise BadInput("--task", args.task, "its options are set off by colons, as in modular:m=5")
    if args.seeds < 1:
        raise BadInput("--seeds", args.seeds, "must be at least 1")
    task, _, options = args.task.partition(":")
    given = {"task": task, "options": options, "families": args.families.replace(",", ":"), "size": args.size,
             "steps": args.steps, "seeds": args.seeds}  # fmt: skip
    args.config = "probe:" + ",".join(f"{name}={value}" for name, value in given.items() if value)
    sweep, root = _expand(args)
    for drop in sweep.dropped:
        raise BadInput("--families", drop.overrides["family"], f"cannot be trained so: {drop.reason}")
    specs = [run.spec for run in sweep.runs]
    sizes = _numbers("--lengths", args.lengths) or _numbers("--pairs", args.pairs) or probe.default_sizes(specs[0])
    probe.check_sizes(specs[0], sizes)
    path = sweep.save(root)
    outcome = local.run_all(root, [spec.id for spec in specs], args.jobs)
    tables.outcome(outcome, path)
    done = [root / spec.id for spec in specs if (record := records.read(root / spec.id)) and record.status == "done"]
    if done:
        found = probe.summary(probe.table(done, sizes))
        task, trained = probe.task_of(specs[0]), probe.trained_size(specs[0])
        tables.probe(found, task, trained)
        if args.out:
            figure: Any = model_plots.probe(found, axis=task.axis, trained=trained, chance=task.chance).figure
            figure.savefig(args.out, dpi=150)
    return FAILED if outcome.failed or not done else STOPPED if outcome.stopped else DONE


def _list(given: Sequence[str]) -> list[str]:
    return [item for text in given for item in text.split(",") if item]


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(item) for item in text.split(",") if item]
    except ValueError:
        raise BadInput(option, text, "must be whole numbers, by commas") from None
    if any(number < 1 for number in numbers):
        raise BadInput(option, text, "must be at least 1 each")
    return list(dict.fromkeys(numbers))


def _out(folder: str) -> pathlib.Path:
    if not folder:  # it would be the current one
        raise BadInput("--out", folder, "must name a folder")
    return pathlib.Path(folder)


def _export(args: argparse.Namespace) -> int:
    from scalelab.exchange import command

    print(command.export_hf(pathlib.Path(args.path), _out(args.out)))
    return DONE


def _import(args: argparse.Namespace) -> int:
    from scalelab.exchange import command

    print(command.import_hf(pathlib.Path(args.path), _out(args.out)))
    return DONE


def _data(args: argparse.Namespace) -> int:
    from scalelab.data import command

    return command.main(args)


def _bench(args: argparse.Namespace) -> int:
    if args.what == "fit":
        for library in ("OPENBLAS", "MKL", "OMP"):  # one thread for both sides; read when NumPy is imported
            os.environ[f"{library}_NUM_THREADS"] = "1"
        from scalelab.bench import fit

        return fit.main(args.repeats, args.whole)
    if args.what == "families":
        from scalelab.bench import families

        return families.main(
            1e5 if args.params is None else args.params, families=[name for name in args.families.split(",") if name]
        )
    if args.what == "train":
        from scalelab.bench import throughput

        return throughput.main(
            130e6 if args.params is None else args.params,
            [name for name in args.families.split(",") if name], args.kernels.split(","),
            args.rows, args.seq_len, args.torch, args.packed, args.profile,
        )  # fmt: skip
    if args.what == "kernels":
        from scalelab.bench import kernels

        families = [name for name in args.families.split(",") if name]
        if args.list and families:
            params = 130e6 if args.params is None else args.params
            return kernels.list_families(families, params, args.rows, args.seq_len, args.dtype)
        return kernels.main([op for op in args.ops.split(",") if op], args.list, args.torch, args.dtype)
    if args.what == "coords":
        from scalelab.bench import coords

        return coords.main(
            args.family,
            args.parametrizations.split(","),
            _numbers("--widths", args.widths),
            _numbers("--depths", args.depths),
            args.steps,
            args.seeds,
            args.out,
            args.plot,
        )
    from scalelab.bench import step

    return step.main(args.pairs)
