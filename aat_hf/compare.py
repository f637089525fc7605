"""Run a causal language model with two attention implementations and compare what comes out."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class ComparisonError(RuntimeError):
    """The model cannot be compared, or one of its outputs makes no sense."""


@dataclass
class AttentionClock:
    """Seconds spent inside one registered attention function.

    Attributes:
        seconds: Total so far.
        calls: How often it was called.
    """

    seconds: float = 0.0
    calls: int = 0


@dataclass(frozen=True)
class Pass:
    """One forward pass over a text.

    Attributes:
        hidden: What the language model head is applied to, (tokens, hidden).
        attention_seconds: Time inside the attention function.
        total_seconds: Time of the whole pass.
    """

    hidden: Tensor
    attention_seconds: float
    total_seconds: float


@dataclass(frozen=True)
class Quality:
    """What a change of attention does to next-token predictions, averaged over positions.

    Attributes:
        nll_dense: Negative log-likelihood of the text under the first pass, nats per token.
        nll_aat: The same under the second.
        kl: KL divergence of the second's prediction from the first's, KL(dense ‖ aat), nats.
        kl_p99: 99th percentile of that divergence over positions.
        top1_agreement: Share of positions where both name the same most likely token.
        positions: How many positions were averaged.
    """

    nll_dense: float
    nll_aat: float
    kl: float
    kl_p99: float
    top1_agreement: float
    positions: int

    @property
    def nll_difference(self) -> float:
        """By how much the second pass is worse (positive) or better (negative)."""
        return self.nll_aat - self.nll_dense


@contextmanager
def clocked_attention(name: str, on_call: Callable[[int], None] | None = None) -> Iterator[AttentionClock]:
    """Time every call of the attention function that Transformers knows as `name`.

    Args:
        name: For example "sdpa" or "aat".
        on_call: Told how many calls have been made, after each.
    """
    clock = AttentionClock()

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            _synchronize()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            _synchronize()
            clock.seconds += time.perf_counter() - start
            clock.calls += 1
            if on_call is not None:
                on_call(clock.calls)
            return result

        return timed

    with replaced_attention(name, wrap):
        yield clock


@contextmanager
def replaced_attention(name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Put `wrap(function)` in place of the attention function that Transformers knows as `name`."""
    table = ALL_ATTENTION_FUNCTIONS
    # An entry of this one table hides the library-wide one; put back what was there.
    local = table._local_mapping
    had, before = name in local, local.get(name)
    table[name] = wrap(table[name])
    try:
        yield
    finally:
        if had and before is not None:
            table[name] = before
        else:
            del table[name]


def _synchronize() -> None:
    """Wait for the accelerator, so that a clock sees its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@torch.inference_mode()
def run_pass(
    model: PreTrainedModel,
    input_ids: Tensor,
    implementation: str,
    on_call: Callable[[int], None] | None = None,
) -> Pass:
    """Run the model over a text once, without a cache.

    Args:
        model: A causal language model.
        input_ids: The text, (1, tokens).
        implementation: Name of the attention implementation.
        on_call: Told how many attention calls have been made, after each.

    Raises:
        ComparisonError: The model's logits are not those of its head on its last hidden state.
    """
    model.set_attn_implementation(implementation)
    captured: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        captured.append(output.last_hidden_state)

    # The logits of all positions would be (tokens, vocabulary); one is enough to check the head.
    few = {"logits_to_keep": 1} if _keeps_logits(model) else {}
    hook = model.base_model.register_forward_hook(keep)
    start = time.perf_counter()
    try:
        with clocked_attention(implementation, on_call) as clock:
            logits = model(input_ids=input_ids, use_cache=False, **few).logits[0, -1]
    finally:
        hook.remove()
    _synchronize()
    total = time.perf_counter() - start
    hidden = captured[0][0]
    if not torch.allclose(head_logits(model, hidden[-1:])[0], logits.float(), rtol=0.02, atol=0.02):
        raise ComparisonError(
            f"{type(model).__name__} changes its logits after the head in a way that is not known "
            "here: compare another model"
        )
    return Pass(hidden, clock.seconds, total)


def _keeps_logits(model: PreTrainedModel) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits in float32 from hidden states: (positions, hidden) to (positions, vocabulary)."""
    head = model.get_output_embeddings()
    if head is None:
        raise ComparisonError(f"{type(model).__name__} has no language model head")
    logits: Tensor = head(hidden).float()
    config = model.config.get_text_config()
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / divisor
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        logits = torch.tanh(logits / cap) * cap
    return logits


@torch.inference_mode()
def quality(
    model: PreTrainedModel,
    input_ids: Tensor,
    dense: Tensor,
    aat: Tensor,
    *,
    every: int = 1,
    chunk: int = 256,
    on_position: Callable[[int], None] | None = None,
) -> Quality:
    """Compare two passes' predictions of each next token.

    Args:
        model: The model of both passes.
        input_ids: The text, (1, tokens).
        dense: Hidden states of the first pass, (tokens, hidden).
        aat: Hidden states of the second pass, (tokens, hidden).
        every: Compare every so many positions.
        chunk: Positions whose logits are in memory at a time.
        on_position: Told how many positions are done.
    """
    targets = input_ids[0, 1:][::every]
    dense, aat = dense[:-1][::every], aat[:-1][::every]
    positions = targets.shape[0]
    if positions == 0:
        raise ComparisonError("two tokens at least are needed to predict one")
    sums = torch.zeros(3, dtype=torch.float64)
    divergences = []
    for start in range(0, positions, chunk):
        rows = slice(start, min(start + chunk, positions))
        wanted = targets[rows, None]
        first = torch.log_softmax(head_logits(model, dense[rows]), dim=-1)  # [chunk, V]
        second = torch.log_softmax(head_logits(model, aat[rows]), dim=-1)  # [chunk, V]
        parts = (
            -first.gather(1, wanted).sum(),
            -second.gather(1, wanted).sum(),
            (first.argmax(-1) == second.argmax(-1)).sum(),
        )
        divergences.append((first.exp() * (first - second)).sum(-1).double().cpu())
        sums += torch.stack([part.double() for part in parts]).cpu()
        if on_position is not None:
            on_position(rows.stop)
    nll_dense, nll_aat, agreement = (sums / positions).tolist()
    divergence = torch.cat(divergences)
    if not math.isfinite(nll_dense + nll_aat):
        raise ComparisonError("a likelihood is not finite: the model or its attention is broken")
    return Quality(nll_dense, nll_aat, float(divergence.mean()), float(divergence.quantile(0.99)), agreement, positions)
