"""`aat demo`: a real model on a long text, dense and tiled side by side."""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import aat_hf
from aat_hf.compare import Pass, Quality, quality, run_pass
from aat_hf.data import ModelUnavailableError, read_text, resolve_model
from aat_hf.data.progress import notice, progress, quiet_transformers
from aat_hf.picture import render_map

_CHARS_PER_TOKEN = 8  # more than any tokenizer needs on code or prose


@dataclass(frozen=True)
class Outcome:
    """What one run of the demo found.

    Attributes:
        tokens: Length of the text.
        density: Share of the allowed tiles that were computed.
        infidelity: Audited lost probability, mean and half-width of its confidence interval; None
            when nothing was tiled, so that nothing is lost.
        quality: Likelihoods and agreement.
        attention_seconds: Inside the attention functions: dense, aat.
        total_seconds: Of whole passes: dense, aat.
        paths: How many calls went each way (tiled, skip, dense).
        reasons: Why calls were not tiled, with their number.
    """

    tokens: int
    density: float
    infidelity: tuple[float, float] | None
    quality: Quality
    attention_seconds: tuple[float, float]
    total_seconds: tuple[float, float]
    paths: dict[str, int]
    reasons: dict[str, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the demo's options."""
    parser.add_argument("--model", help="folder or name on the Hub (SmolLM2-135M-Instruct)")
    parser.add_argument("--text", type=Path, help="UTF-8 file (the standard library's source)")
    parser.add_argument("--tokens", type=_token_count, default=4096, help="length of the text (4096)")
    parser.add_argument("--tolerance", type=_tolerance, help="probability that may be lost")
    parser.add_argument("--layer", type=int, help="layer of the tile map shown")
    parser.add_argument("--head", type=int, help="head of the tile map shown")
    parser.add_argument("--device", help="cpu, cuda ... (an accelerator when there is one)")
    parser.add_argument("--json", type=_new_file, help="also write the numbers to this file")


def _token_count(text: str) -> int:
    count = int(text)
    if count < 2:
        raise argparse.ArgumentTypeError(f"{count}: two tokens at least are needed")
    return count


def _tolerance(text: str) -> float:
    try:
        return aat_hf.AATConfig(tolerance=float(text)).tolerance
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _new_file(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.resolve().parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: give a file in a folder that exists")
    return path


def run(args: argparse.Namespace) -> int:
    """Run the demo; the process's exit status."""
    model, tokenizer = load_model(args.model, args.device)
    input_ids = encode(model, tokenizer, args.text, args.tokens)
    changes = {} if args.tolerance is None else {"tolerance": args.tolerance}
    settings = aat_hf.configure(model, **changes)
    outcome, report = measure(model, input_ids)
    details = describe(args, model, settings)
    print("{model} on {device} ({dtype}), tolerance {tolerance}".format(**details))
    print(render(outcome))
    print()
    print(render_map(report, args.layer, args.head))
    if args.json is not None:
        args.json.write_text(json.dumps(details | asdict(outcome), indent=2) + "\n", "utf-8")
        notice(f"Wrote {args.json}")
    return 0


def load_model(name: str | None, device: str | None) -> tuple[PreTrainedModel, Any]:
    """The model in evaluation mode and its tokenizer; float32 on a CPU, bfloat16 elsewhere."""
    source = resolve_model(name)
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = accelerator.type if accelerator is not None else "cpu"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with quiet_transformers(), progress(f"Loading {source}", 0):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ModelUnavailableError(
                f"cannot load {source} ({first}): give a folder with a causal language model, a "
                "name on the Hub that can be reached, or no --model for the packaged one"
            ) from error
        torch.nn.Module.to(model, device)  # Transformers' own `to` hides its signature
        return model.eval(), tokenizer


def encode(model: PreTrainedModel, tokenizer: Any, path: Path | None, tokens: int) -> Tensor:
    """The first `tokens` tokens of the text, (1, tokens), fewer where text or model end."""
    text = read_text(path, min_chars=tokens * _CHARS_PER_TOKEN)
    ids = tokenizer(text[: tokens * 4 * _CHARS_PER_TOKEN], verbose=False).input_ids
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or tokens
    length = min(tokens, limit, len(ids))
    if length < tokens:
        why = "the model's context" if limit <= len(ids) else "the text"
        notice(f"{why} ends at {length} tokens, fewer than the {tokens} asked for")
    return torch.tensor([ids[:length]], device=model.device)


def measure(model: PreTrainedModel, input_ids: Tensor) -> tuple[Outcome, Any]:
    """Compare the implementations on a text.

    Each runs twice: the first pass warms up (and, tiled, compiles, audits and keeps the maps), the
    second is timed; the faster of the two counts.
    """
    dense_times = [_pass(model, input_ids, "sdpa", "Dense attention")]
    with aat_hf.record(model, keep_maps=True) as report:
        tiled = _pass(model, input_ids, "aat", "Tiled attention, first pass")
    dense_times.append(_pass(model, input_ids, "sdpa", "Dense attention, timed"))
    aat_times = [tiled, _pass(model, input_ids, "aat", "Tiled attention, timed")]
    with progress("Comparing predictions", input_ids.shape[1]) as update:
        found = quality(model, input_ids, dense_times[0].hidden, tiled.hidden, on_position=update)
    paths: dict[str, int] = {}
    reasons: dict[str, int] = {}
    for record in report.layers:
        paths[record.path] = paths.get(record.path, 0) + 1
        if record.path != "tiled" and record.reason:
            reasons[record.reason] = reasons.get(record.reason, 0) + 1
    mean, half_width = report.infidelity
    outcome = Outcome(
        tokens=input_ids.shape[1],
        density=float(report.density),
        infidelity=(float(mean), float(half_width)) if math.isfinite(mean) else None,
        quality=found,
        attention_seconds=_fastest(dense_times, aat_times, lambda one: one.attention_seconds),
        total_seconds=_fastest(dense_times, aat_times, lambda one: one.total_seconds),
        paths=paths,
        reasons=reasons,
    )
    return outcome, report


def _pass(model: PreTrainedModel, input_ids: Tensor, implementation: str, title: str) -> Pass:
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    with progress(title, layers) as update:
        return run_pass(model, input_ids, implementation, on_call=update)


def _fastest(dense: Sequence[Pass], aat: Sequence[Pass], of: Callable[[Pass], float]) -> tuple[float, float]:
    return min(map(of, dense)), min(map(of, aat))


def render(outcome: Outcome) -> str:
    """The table of numbers."""
    found = outcome.quality
    lost = outcome.infidelity
    audited = "not audited" if lost is None else f"{lost[0]:.4f} ± {lost[1]:.4f}"
    ways = ", ".join(f"{count} {path}" for path, count in sorted(outcome.paths.items()))
    rows = [
        ("", "dense (sdpa)", "aat", ""),
        ("tokens", str(outcome.tokens), str(outcome.tokens), ""),
        ("layers", "", ways, ""),
        ("density of tiles", "1", f"{outcome.density:.3f}", ""),
        ("lost probability (audited)", "0", audited, ""),
        (
            "NLL, nats per token",
            f"{found.nll_dense:.4f}",
            f"{found.nll_aat:.4f}",
            f"{found.nll_difference:+.4f}",
        ),
        ("KL(dense ‖ aat), mean", "0", f"{found.kl:.4f}", ""),
        ("same most likely token", "1", f"{found.top1_agreement:.4f}", ""),
        _times("attention, seconds", outcome.attention_seconds),
        _times("whole pass, seconds", outcome.total_seconds),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * (sum(widths) + 6))
    lines += [f"not tiled ({count} layers): {reason}" for reason, count in outcome.reasons.items()]
    return "\n".join(lines)


def _times(title: str, seconds: tuple[float, float]) -> tuple[str, str, str, str]:
    """A row of times with their ratio, dense over aat."""
    dense, aat = seconds
    return title, f"{dense:.3f}", f"{aat:.3f}", f"{dense / aat:.2f}x" if aat > 0 else ""


def describe(args: argparse.Namespace, model: PreTrainedModel, settings: aat_hf.AATConfig) -> dict[str, Any]:
    """What was run, and on what, for the JSON file."""
    return {
        "model": args.model or Path(model.config._name_or_path).name,
        "text": str(args.text) if args.text else "Python standard library",
        "tolerance": settings.tolerance,
        "aat": settings.to_dict(),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
