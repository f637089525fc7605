"""The options of `aat publish`, and what it does with them."""

from __future__ import annotations

import argparse
from pathlib import Path

from aat_hf.data.progress import notice


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("trained", type=Path, help="folder with model, tokenizer and trainer_state.json")
    parser.add_argument("target", type=Path, help="the repository's folder, which does not exist yet")
    parser.add_argument("--eval", type=Path, required=True, help="folder of `aat eval --out`, or with other CSV tables")
    parser.add_argument("--dense", type=Path, help="folder with the trainer_state.json of the dense twin")
    parser.add_argument("--name", help="title of the card (the name of the target)")
    parser.add_argument("--license", required=True, help="the Hub's identifier of the licence, such as apache-2.0")
    parser.add_argument("--license-file", type=Path, required=True, help="its text")
    parser.add_argument("--data", required=True, help="the text it was trained on, with that text's licence")
    parser.add_argument("--hardware", required=True, help="the machine it was trained and measured on")
    parser.add_argument("--template", type=Path, help='of the card; it may extend "card.md"')
    parser.add_argument("--max-file-mb", type=float, help="split the weights into files of at most so many MB")
    parser.add_argument("--push", metavar="OWNER/NAME", help="then upload it to the Hub; without this nothing is sent")
    parser.add_argument("--private", action="store_true", help="a repository that --push creates is private")


def run(args: argparse.Namespace) -> int:
    """Build the repository, push it if told to; the process's exit status."""
    from aat_hf.publish.folder import Sources, build
    from aat_hf.publish.push import push

    name = args.name or args.target.resolve().name
    sources = Sources(
        trained=args.trained,
        evaluation=args.eval,
        name=name,
        repository=args.push or name,
        license=args.license,
        license_file=args.license_file,
        data=args.data,
        hardware=args.hardware,
        dense=args.dense,
        template=args.template,
        max_file_mb=args.max_file_mb,
    )
    build(sources, args.target)
    notice(f"Wrote {args.target}")
    if args.push:
        print(push(args.target, args.push, private=args.private))
    return 0
