"""What the two build scripts share: their options, and the last step."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from aat_hf import cli
from aat_hf.bench._common import environment
from aat_hf.config import BACKENDS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))  # where the training scripts are

from _finetuning import WEIGHTS  # noqa: E402
from _texts import LICENCES  # noqa: E402

MAX_FILE_MB = 16.0  # what a git repository can hold without Git LFS
TEXT = "packages"


def parser_of(description: str | None, name: str, learning_rate: float, **sizes: int) -> argparse.ArgumentParser:
    """The options; `sizes` are the defaults of those that are whole numbers."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build") / name, help=f"working folder (build/{name})")
    parser.add_argument("--text", default=TEXT, help=f"{', '.join(LICENCES)} or a UTF-8 file ({TEXT})")
    parser.add_argument("--path", type=Path, help="WikiText on disk, as Parquet or text")
    parser.add_argument("--data", help="what a file of --text is, with its licence, for the card")
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--learning-rate", type=float, default=learning_rate, help=f"highest one ({learning_rate:g})")
    parser.add_argument("--backend", default="gather", choices=BACKENDS, help="that trains (gather)")
    parser.add_argument("--weights", default="bfloat16", choices=WEIGHTS, help="as which they are saved (bfloat16)")
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.1, 0.05, 0.02], help="of the evaluation")
    parser.add_argument("--push", metavar="OWNER/NAME", help="then upload it to the Hub")
    for option, default in sizes.items():
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=default, help=f"({default})")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; a text without a description of its licence is refused before the training, not after it."""
    args = parser.parse_args(argv)
    args.data = args.data or LICENCES.get(args.text)
    if args.data is None:
        parser.error(f"--text {args.text}: say with --data what it is and under which licence")
    return args


def training_options(args: argparse.Namespace, trained: Path) -> list[str]:
    """For the training script: every size and the text."""
    names = ("tokens", "steps", "batch", "layers", "width", "heads", "vocabulary", "held_out_rows", "tolerance", "text",
             "exact_steps", "characters", "backend", "weights", "learning_rate")  # fmt: skip
    options = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    options += ["--path", str(args.path)] if args.path else []
    return [*options, "--output", str(trained)]


def publish(args: argparse.Namespace, trained: Path, name: str, template: str) -> None:
    """`aat publish`, with the exit status of the process when it fails."""
    options = ["--eval", str(trained / "eval"), "--dense", str(trained / "dense"), "--name", name]
    options += ["--license", "apache-2.0", "--license-file", str(ROOT / "LICENSE"), "--data", args.data]
    options += ["--hardware", hardware(), "--template", str(Path(__file__).with_name(template))]
    options += ["--max-file-mb", f"{MAX_FILE_MB:g}", *(["--push", args.push] if args.push else [])]
    run(["publish", str(trained), str(args.output / name), *options])


def run(command: Sequence[str]) -> None:
    """One `aat` command; ends the process when it fails."""
    if status := cli.main(command):
        sys.exit(status)


def hardware() -> str:
    """The device that trains, and the versions."""
    device = torch.accelerator.current_accelerator(check_available=True)
    name = torch.cuda.get_device_name() if device is not None and device.type == "cuda" else str(device or "CPU")
    return f"{name}; {environment()}"
