"""`scalelab data build`: its arguments and what it prints."""

from __future__ import annotations

import argparse
import sys

from scalelab.data import inputs, text
from scalelab.data.builder import build


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `scalelab data build`."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help=f"files ({', '.join(inputs.SUFFIXES)}), folders of "
        "them, a data set saved by Hugging Face datasets, or hf:NAME[:SPLIT]",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder for shards and manifest.json")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, bpe:VOCAB or a tokenizer.json (default: bytes)")
    parser.add_argument("--text-field", default="text", help="field that holds the text (default: text)")
    parser.add_argument("--shard-tokens", type=int, default=2**26, help="most tokens of a shard (default: 2^26)")
    parser.add_argument("--seed", type=int, default=0, help="of the documents' order (default: 0)")
    parser.add_argument(
        "--held-out",
        type=float,
        default=text.HELD_OUT_SHARE,
        metavar="SHARE",
        help=f"share of the documents, by hash (default: {text.HELD_OUT_SHARE})",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def main(args: argparse.Namespace) -> int:
    """Runs the build that parsed arguments ask for; prints what was made; returns the exit status."""
    document = build(
        args.inputs,
        args.out,
        tokenizer=args.tokenizer,
        text_field=args.text_field,
        shard_tokens=args.shard_tokens,
        seed=args.seed,
        held_out=args.held_out,
        progress=not args.quiet,
    )
    train = sum(entry["tokens"] for entry in document["train"])
    held = document["held_out_documents"]
    print(
        f"{args.out}: {document['documents']} documents, {document['bytes']} bytes -> {train} training tokens in "
        f"{len(document['train'])} shard(s), {held['documents']} held-out documents, "
        f"vocabulary {document['vocab_size']}"
    )
    if held["lossy"]:
        print(f"{held['lossy']} held-out documents left out: the tokenizer doesn't give them back", file=sys.stderr)
    return 0
