"""The commands and their flags: all that `--help` says. Those of the laws are in `laws_flags`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from scalelab import __version__, laws_flags

BAD_INPUT = 2  # exit status


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    root = Parser(prog="scalelab", description="Scaling-law experiments: plan, train, record, fit, decide.")
    root.add_argument("--version", action="version", version=f"scalelab {__version__}")
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str, help: str, **kwargs: Any) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help, allow_abbrev=False, **kwargs)

    def configurable(p: argparse.ArgumentParser, required: bool = True) -> None:
        p.add_argument(
            "--config", required=required, metavar="NAME[:ARG]", help="built-in config or .py file, with its argument"
        )
        p.add_argument("--runs", default=None, metavar="DIR", help="folder of run directories (default: config.runs)")
        p.epilog = "Any field of the config can be given as --config.section.field=value."

    p = command("plan", "Show what a config or sweep would run, and what it drops; or, from a fit, what to run")
    configurable(p, required=False)
    laws_flags.add_plan(p)
    p = command("train", "Train one run, from wherever an earlier attempt left it")
    configurable(p, required=False)
    p.add_argument("--spec", metavar="FILE", help="a run's spec.json instead of a config")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    # a sweep, whose worker this is: its runs come by stdin
    p.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    p = command("sweep", "Train all runs of a config that are not finished yet")
    configurable(p)
    p.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    p.add_argument("--name", default="", help="name of the sweep's file (default: the config's and a hash)")
    p = command("status", "Table of runs: done, running, failed, missing, time left")
    p.add_argument("path", nargs="?", default="runs", help="a run, a sweep's .json or a folder of runs (default: runs)")
    p = command("fit", "Fit a law to runs or to any CSV")
    laws_flags.add_fit(p)
    p = command("compare", "Fit one law to several arms: compute multiplier, crossing, verdict")
    laws_flags.add_compare(p)
    p = command("report", "Fit the laws to runs; tables here, everything in one HTML file")
    p.add_argument("path", help="a run folder or a sweep's .json")
    p.add_argument("--out", default="report.html", metavar="FILE")
    p.add_argument("--bootstrap", type=int, default=1000, metavar="N")
    p.add_argument("--title", default="scalelab report")
    p = command("sample", "Write text from a run")
    p.add_argument("run", help="a run's folder")
    p.add_argument("--prompt", default="", help="text to continue")
    p.add_argument("--tokens", type=int, default=200, metavar="N", help="tokens to write (default: 200)")
    p.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token each time (default: 0.8)")
    p.add_argument("--seed", type=int, default=0)
    p = command("eval", "Score a finished run: held-out sets, longer contexts, multiple choice; into its record")
    p.add_argument("run", help="a run's folder, a sweep's .json or a folder of runs")
    p.add_argument(
        "--data", action="append", default=[], metavar="[NAME=]SOURCE,...",
        help="text files or folders, token shards, synthetic[:SPEC]; their held-out part (default: the run's own)",
    )  # fmt: skip
    p.add_argument("--context", default="", metavar="N,...", help="window lengths (default: as trained)")
    p.add_argument("--tasks", action="append", default=[], metavar="[NAME=]FILE,...", help="multiple choice, in JSONL")
    p = command("probe", "Train small models on a synthetic task and show what each architecture can do")
    p.add_argument("--task", default="parity", metavar="NAME[:OPTION=VALUE...]",
                   help="parity | modular | recall | copy (default: parity)")  # fmt: skip
    p.add_argument("--families", default="", metavar="A,B,...", help="default: slstm,deltanet,mamba,transformer")
    p.add_argument("--size", type=int, default=0, metavar="N", help="length or pairs to train up to")
    sizes = p.add_mutually_exclusive_group()
    sizes.add_argument("--lengths", default="", metavar="N,...", help="sizes to test (default: from --size)")
    sizes.add_argument("--pairs", default="", metavar="N,...", help="the same, as recall counts them")
    p.add_argument("--steps", type=int, default=0, metavar="N")
    p.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each family (default: 1)")
    p.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    p.add_argument("--runs", default=None, metavar="DIR", help="folder of run directories (default: config.runs)")
    p.add_argument("--out", default=None, metavar="FILE", help="figure to write (.png, .pdf, .svg)")
    p.set_defaults(config="probe")
    p.epilog = "Any field of the config can be given as --config.section.field=value."
    p = command("export", "Write a run's model for other software")
    p.add_argument("path", help="a run's folder, or one that `scalelab import` wrote")
    p.add_argument("--format", default="hf", choices=("hf",), help="hf: Hugging Face transformers (default)")
    p.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    p = command("import", "Read a model of Hugging Face transformers")
    p.add_argument("path", help="folder of config.json and safetensors")
    p.add_argument("--out", required=True, metavar="DIR", help="folder to write: model.json and model.safetensors")
    p = command("data", "Build data sets")
    verbs = p.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    build = verbs.add_parser(
        "build", help="Tokenize documents into shards", description="Tokenize documents into shards"
    )
    if "data" in argv[:1]:  # its arguments live beside the builder, whose imports the other commands need not pay
        from scalelab.data.command import add_arguments

        add_arguments(build)
    p = command("bench", "Measure scalelab itself; ratios to a baseline in the same run")
    _add_bench(p)
    return root


def _add_bench(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "what", choices=("step", "fit", "families", "train", "kernels", "coords"),
        help="step: the loop's overhead over the bare jitted step; fit: fitting a law, against SciPy; families: "
        "training speed of each family over the Transformer's; train: tokens per second and "
        "utilisation of this device, with and without kernels; kernels: each operation, which implementation runs, its "
        "error, time and memory; coords: do activations and their updates stay of one "
        "size over widths and depths",
    )  # fmt: skip
    p.add_argument("--pairs", type=int, default=300, metavar="N", help="step: interleaved pairs (default: 300)")
    p.add_argument("--repeats", type=int, default=7, metavar="N", help="fit: interleaved repeats (default: 7)")
    p.add_argument("--whole", action="store_true", help="fit: time SciPy's 4,500 starts in full too")
    p.add_argument("--params", type=float, default=None, metavar="N",
                   help="families, train, kernels --list: size of each (default: 1e5, 130e6, 130e6)")  # fmt: skip
    p.add_argument("--families", default="", metavar="A,B,...",
                   help="families, train: which (default: all of the recipe); kernels --list: what their training "
                   "steps take, not the benchmark's shapes")  # fmt: skip
    p.add_argument("--kernels", default="auto,xla", metavar="A,B,...",
                   help="train: implementations, as in config.kernels (default: auto,xla)")  # fmt: skip
    p.add_argument("--rows", type=int, default=8, metavar="N", help="train: of a batch (default: 8)")
    p.add_argument("--seq-len", type=int, default=2048, metavar="N", help="train: tokens of a row (default: 2048)")
    p.add_argument("--packed", action="store_true", help="train: rows of several documents, masked from each other")
    p.add_argument("--torch", action="store_true",
                   help="train, kernels: beside PyTorch's Llama, PyTorch's operations")  # fmt: skip
    p.add_argument("--profile", action="store_true", help="train: say where the time of each step goes")
    p.add_argument("--ops", default="", metavar="A,B,...", help="kernels: which (default: all)")
    p.add_argument("--list", action="store_true", help="kernels: which implementation runs, and why not a faster")
    p.add_argument("--dtype", default="bfloat16", help="kernels: of the operands (default: bfloat16)")
    p.add_argument("--family", default="transformer", metavar="FAMILY[:OPTIONS]",
                   help="coords: of the recipe, as xlstm:mixer=slstm (default: transformer)")  # fmt: skip
    p.add_argument("--parametrizations", default="standard,mup,completep", metavar="A,B,...",
                   help="coords: which (default: all three)")  # fmt: skip
    p.add_argument("--widths", default="64,128,256,512,1024", metavar="N,N,...",
                   help="coords: (default: 64,128,256,512,1024)")  # fmt: skip
    p.add_argument("--depths", default="2,4,8,16,32", metavar="N,N,...",
                   help="coords: layers (default: 2,4,8,16,32)")  # fmt: skip
    p.add_argument("--steps", type=int, default=4, metavar="N", help="coords: Adam steps (default: 4)")
    p.add_argument("--seeds", type=int, default=3, metavar="N", help="coords: of each model (default: 3)")
    p.add_argument("--out", default=None, metavar="FILE", help="coords: the table, as CSV")
    p.add_argument("--plot", default=None, metavar="FILE", help="coords: a picture (.png, .svg, .pdf)")
