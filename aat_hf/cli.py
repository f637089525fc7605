"""The `aat` command."""

from __future__ import annotations

import argparse
import importlib
import io
import pkgutil
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the process's exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an old code page must not end a run
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        return _dispatch(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except _errors_for_the_user() as error:  # anything else is a bug and keeps its traceback
        print(f"aat: {error}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """The parser with its subcommands."""
    from aat_hf.demo import add_arguments
    from aat_hf.evaluation import command
    from aat_hf.publish import command as publish_command

    parser = argparse.ArgumentParser(prog="aat", description="Adaptive attention tiling.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="a real model on a long text, dense and tiled side by side")
    add_arguments(demo)
    doctor = commands.add_parser("doctor", help="what is installed and usable, and how to mend it")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    calibrate = commands.add_parser("calibrate", help="measure this machine, so that the faster kernel is used")
    calibrate.add_argument("--device", default="cpu", help="cpu, cuda or vulkan")
    calibrate.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    calibrate.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    calibrate.add_argument("--heads", type=int, default=8)
    calibrate.add_argument("--rounds", type=int, default=3)
    evaluate = commands.add_parser("eval", help="what a tolerance costs: predictions and long-context tasks")
    command.add_arguments(evaluate)
    publish = commands.add_parser("publish", help="a Hub repository from a trained model, its card measured")
    publish_command.add_arguments(publish)
    bench = commands.add_parser("bench", help="run a benchmark", add_help=False)
    bench.add_argument("name", nargs="?", help="which one; without it they are listed")
    bench.add_argument("rest", nargs=argparse.REMAINDER, help="options of the benchmark")
    return parser


def _dispatch(args: argparse.Namespace) -> int:
    if args.command == "demo":
        from aat_hf import demo

        return demo.run(args)
    if args.command == "doctor":
        from aat_hf import doctor

        return doctor.run(as_json=args.json)
    if args.command == "calibrate":
        from aat_hf import calibrate

        return calibrate.run(args)
    if args.command == "eval":
        from aat_hf.evaluation import command

        return command.run(args)
    if args.command == "publish":
        from aat_hf.publish import command as publish_command

        return publish_command.run(args)
    return _bench(args.name, args.rest)


def _bench(name: str | None, rest: list[str]) -> int:
    """Run `aat_hf.bench.NAME`, or list what there is."""
    package = importlib.import_module("aat_hf.bench")
    known = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_"))
    if name not in known:
        wanted = name not in (None, "-h", "--help")
        message = f"no benchmark {name!r}; " if wanted else ""
        listing = ", ".join(known) or "none are installed"
        print(f"{message}benchmarks: {listing}", file=sys.stderr if wanted else sys.stdout)
        return 2 if wanted else 0
    status = importlib.import_module(f"aat_hf.bench.{name}").main(rest)
    return int(status or 0)


def _errors_for_the_user() -> tuple[type[Exception], ...]:
    """Errors whose message says what to do."""
    from aat_hf.compare import ComparisonError
    from aat_hf.data import DatasetUnavailableError, ModelUnavailableError, TextUnavailableError
    from aat_hf.data.sources import MissingLibraryError
    from aat_hf.errors import UnsupportedAttentionError
    from aat_hf.publish.errors import PublishError
    from aat_hf.vulkan.errors import VulkanError

    unavailable = ModelUnavailableError, TextUnavailableError, DatasetUnavailableError, MissingLibraryError
    return *unavailable, UnsupportedAttentionError, ComparisonError, PublishError, VulkanError


if __name__ == "__main__":
    sys.exit(main())
