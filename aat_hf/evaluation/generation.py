"""Long-context tasks through `model.generate`, dense and tiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import aat_hf
from aat_hf.data.progress import progress
from aat_hf.evaluation.tasks import Example, make_example, score


@dataclass(frozen=True)
class TaskResult:
    """One task with one tolerance.

    Attributes:
        task: Name of the task.
        tolerance: None: dense attention.
        tokens: Mean length of the prompts.
        examples: How many.
        score: Mean share of the answers given.
        same_as_dense: Share of examples with the very text that dense attention gives.
        density: Mean share of the tiles computed in the prompt.
        lost: Mean audited infidelity; NaN when nothing was tiled.
    """

    task: str
    tolerance: float | None
    tokens: float
    examples: int
    score: float
    same_as_dense: float
    density: float
    lost: float


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    settings: Sequence[aat_hf.AATConfig],
    *,
    tokens: int,
    examples: int,
    seed: int,
) -> list[TaskResult]:
    """For every task one result dense, then one for each settings.

    Args:
        model: A causal language model; its settings are changed.
        tokenizer: Its tokenizer; a chat template is used if it has one.
        tasks: Names of `aat_hf.evaluation.tasks.TASKS`.
        settings: One tiled run for each.
        tokens: Longest prompt and answer together.
        examples: Questions for each task.
        seed: Of the questions.

    Raises:
        ComparisonError: No question fits into so many tokens.
    """
    results = []
    with progress(f"Tasks of {tokens} tokens", len(tasks) * examples * (1 + len(settings))) as update:
        done = 0
        for task in tasks:
            asked = [make_example(task, seed, n, lambda one: _fits(one, tokenizer, tokens)) for n in range(examples)]
            dense: list[str] = []
            for one in (None, *settings):
                runs = []
                for example in asked:
                    runs.append(_answer(model, tokenizer, example, one))
                    update(done := done + 1)
                dense = dense or [run[0] for run in runs]
                lengths = [len(_encode(example, tokenizer)) for example in asked]
                results.append(_result(task, one, lengths, asked, runs, dense))
    return results


def _fits(example: Example, tokenizer: Any, tokens: int) -> bool:
    return len(_encode(example, tokenizer)) + example.new_tokens <= tokens


def _encode(example: Example, tokenizer: Any) -> list[int]:
    """Token ids of the prompt and the answer's opening."""
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": example.prompt}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) + example.opening
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    else:
        ids = tokenizer(f"{example.prompt}\n{example.opening}", verbose=False).input_ids
    return ids


def _answer(
    model: Any, tokenizer: Any, example: Example, settings: aat_hf.AATConfig | None
) -> tuple[str, float, float]:
    """What the model writes, greedily, with the density and the audited infidelity of the run."""
    if settings is not None:
        aat_hf.configure(model, **settings.to_dict())
    model.set_attn_implementation("sdpa" if settings is None else "aat")
    input_ids: Tensor = torch.tensor([_encode(example, tokenizer)], device=model.device)
    padding = next((one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id) if one is not None), None)
    with aat_hf.record(model) as report:
        written = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=example.new_tokens,
            do_sample=False,
            pad_token_id=padding,
        )
    text = tokenizer.decode(written[0, input_ids.shape[1] :], skip_special_tokens=True)
    return text, 1.0 if settings is None else report.density, report.infidelity[0]


def _result(
    task: str,
    settings: aat_hf.AATConfig | None,
    lengths: Sequence[int],
    asked: Sequence[Example],
    runs: Sequence[tuple[str, float, float]],
    dense: Sequence[str],
) -> TaskResult:
    count = len(asked)
    return TaskResult(
        task=task,
        tolerance=None if settings is None else settings.tolerance,
        tokens=sum(lengths) / count,
        examples=count,
        score=sum(score(run[0], example.answers) for run, example in zip(runs, asked, strict=True)) / count,
        same_as_dense=sum(run[0] == text for run, text in zip(runs, dense, strict=True)) / count,
        density=sum(run[1] for run in runs) / count,
        lost=sum(run[2] for run in runs) / count,
    )
