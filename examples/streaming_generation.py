"""Ask about a long text and see the answer as it comes, with the metrics live.

    pip install -e '.[demo]'
    python examples/streaming_generation.py
    python examples/streaming_generation.py --text book.txt --tokens 7000 --new-tokens 200 --ask "Who is it about?"

The answer goes to stdout, the metrics to stderr. The prompt runs tiled, each new token exactly. A model without a chat
template, or an empty question, goes on from the text.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _errors import explained
from transformers import TextStreamer

import aat_hf
from aat_hf.data.progress import notice
from aat_hf.demo import encode, load_model

QUESTION = "In a few sentences: what is this text about?"


class MeteredStreamer(TextStreamer):  # type: ignore[misc]
    """Prints the text as it comes and, every so many tokens, what has been measured.

    Args:
        tokenizer: Decodes the tokens.
        report: Of `aat_hf.record`, listening to the model.
        every: Tokens between two lines of metrics.
    """

    def __init__(self, tokenizer: Any, report: aat_hf.Report, every: int = 16) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.report, self.every = report, every
        self.tokens = 0
        self.start = self.first = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate`: first with the prompt, then with each token, (1,)."""
        is_prompt = self.next_tokens_are_prompt
        super().put(value)
        if is_prompt:
            return
        self.tokens += 1
        if self.tokens == 1:
            self.first = time.perf_counter()
            lost, half_width = self.report.infidelity
            audited = "nothing tiled" if lost != lost else f"infidelity {lost:.4f} ± {half_width:.4f}"
            self.say(f"first token after {self.first - self.start:.2f} s; density {self.report.density:.3f}, {audited}")
        elif self.tokens % self.every == 0:
            self.say(f"{self.tokens} tokens, {self.speed:.1f} tokens/s")

    @property
    def speed(self) -> float:
        """Tokens per second since the first one; NaN before the second."""
        return (self.tokens - 1) / (time.perf_counter() - self.first) if self.tokens > 1 else float("nan")

    def say(self, text: str) -> None:
        """One line of metrics, on stderr."""
        sys.stdout.flush()
        notice(f"\n[{text}]" if sys.stderr.isatty() else f"[{text}]")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or name on the Hub (SmolLM2-135M-Instruct)")
    parser.add_argument("--text", type=Path, help="UTF-8 file to read (the standard library's source)")
    parser.add_argument("--ask", default=QUESTION, metavar="QUESTION", help=f"about the text ({QUESTION})")
    parser.add_argument("--tokens", type=int, default=4096, help="length of text and question (4096)")
    parser.add_argument("--new-tokens", type=int, default=64, help="how many to generate (64)")
    parser.add_argument("--tolerance", type=float, default=0.05)
    args = parser.parse_args(argv)

    model, tokenizer = load_model(args.model, None)
    model.set_attn_implementation("aat")
    aat_hf.configure(model, tolerance=args.tolerance)
    input_ids = asked(tokenizer, encode(model, tokenizer, args.text, args.tokens), args.ask)
    with aat_hf.record(model) as report:
        streamer = MeteredStreamer(tokenizer, report)
        model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=args.new_tokens,
            do_sample=False,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    seconds = time.perf_counter() - streamer.start
    read, written = input_ids.shape[1], streamer.tokens
    print(f"\n{read} tokens read, {written} generated in {seconds:.2f} s, {streamer.speed:.1f} tokens/s")
    print("milliseconds of attention: " + ", ".join(f"{name} {ms:.0f}" for name, ms in report.milliseconds.items()))


def asked(tokenizer: Any, input_ids: torch.Tensor, question: str) -> torch.Tensor:
    """The prompt, (1, tokens): the question behind so much of the text, (1, tokens), that it is no longer than that."""
    if not question or tokenizer.chat_template is None:
        return input_ids

    def turn(text: str) -> list[int]:
        message = {"role": "user", "content": f"{text}\n\n{question}"}
        return list(tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=True).input_ids)

    room = limit = input_ids.shape[1]
    while len(prompt := turn(tokenizer.decode(input_ids[0, :room]))) > limit and room:
        room = max(0, room - len(prompt) + limit)
    return torch.tensor([prompt], device=input_ids.device)


if __name__ == "__main__":
    with explained():
        main()
