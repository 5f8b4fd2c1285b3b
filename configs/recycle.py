"""Recycling (Chen et al. 2025, ParScale, section 4): a trained model becomes one of P streams, and only what that adds,
the prefixes and the aggregator, is trained.

    scalelab train --config=recycle:run=runs/ID,streams=2,steps=200
    scalelab plan  --config=recycle:run=runs/ID,streams=4,train=all --config.optim.lr=1e-4

Arguments: run (the folder of a run with weights), streams (P), prefix (keys and values of each stream), steps, train
(new | all: what has gradients), lr (peak; 0: that of the run). Everything else is as in the run, its data included.
"""

import pathlib

from scalelab.config import RunSpec, override, parse_arg
from scalelab.errors import BadInput
from scalelab.schema import Config


def get_config(arg: str = "") -> Config:
    args = parse_arg(arg, run="", streams=2, prefix=48, steps=200, train="new", lr=0.0)
    file = pathlib.Path(args.run) / "spec.json"
    if not file.is_file():
        raise BadInput("config argument run", args.run, "must be the folder of a run (it has no spec.json)")
    config = RunSpec.load(file).config
    if args.streams < 2 or config.model.parscale.streams != 1:
        what = f"must be at least 2, of a run with 1 (this one has {config.model.parscale.streams})"
        raise BadInput("config argument streams", args.streams, what)
    changes = {
        "family": "parscale",
        "start.path": args.run,
        "start.train": args.train,
        "model.parscale.streams": args.streams,
        "model.parscale.prefix": args.prefix,
        "train.steps": args.steps,
        "checkpoint.keep_at": (),
    }
    if args.lr:
        changes["optim.lr"] = args.lr
    return override(config, changes).lock()
