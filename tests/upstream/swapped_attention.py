"""What stands between upstream's tests and aat: the default implementation, the counters, what is left out."""

from __future__ import annotations

import functools
import importlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_testers import Tester
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from aat_hf.hf import interface
from aat_hf.report import record

EXACT: dict[str, Any] = {"tolerance": 0.0}
TILED: dict[str, Any] = dict(
    tolerance=1e-6,
    query_tile=16,
    key_tile=16,
    sink_keys=0,
    local_keys=0,
    max_kept=1.0,
    dense_prefix=0,
    min_length=0,
    backend="cpu",  # a backend that is named is used, whatever the density
    audit="never",  # counting the calls must not cost an audit each
)

# Left out of every class, with the reason. What upstream itself skips (other hardware, other kinds of model, packages
# that are not installed) is not here: those tests are collected and say so.
LEFT_OUT = {
    r"test_generation_tester_mixin_inheritance": "asks for upstream's GenerationTesterMixin, which is not in the "
    "source distribution; generate is compared with eager in tests/hf/test_models.py",
    r"test_bc_torch_dtype": "loads checkpoints in several dtypes and runs no attention; a fifth of the whole time",
    r"test_eager_matches_sdpa_inference_.*_sdpa_kernels": "differs from its twin without the suffix only in which "
    "kernels torch's scaled_dot_product_attention may use",
}

# Tests that run attention, and so have to reach aat (or be skipped by upstream) ...
REACHING = re.compile(
    r"test_(all_tensors_are_parameter_or_buffer|batching_equivalence|can_capture_specific_layers_hidden_states"
    r"|causal_lm_loss_honors_shift_labels|determinism|eager_matches_sdpa_inference_(?!.*output_attentions).*"
    r"|enable_input_require_grads_with_gradient_checkpointing|feed_forward_chunking|hidden_states_output"
    r"|inputs_embeds|inputs_embeds_matches_input_ids|load_with_mismatched_shapes|model_forward_default_config_values"
    r"|model_outputs_equivalence|model_rope_scaling_from_config_.*|problem_types|resize_embeddings_untied"
    r"|resize_tokens_embeddings|save_load|training|training_gradient_checkpointing.*)"
)
# ... and those that also collect attention weights, for which aat is always exact. The classes that tile run the first
# list only: the other tests would do the same again.
REACHING_WEIGHTS = re.compile(
    r"test_(attention_outputs|retain_grad_hidden_states_attentions|capture_outputs_decorator"
    r"|eager_matches_sdpa_inference_.*output_attentions)"
)
# Upstream sets these to "eager" because only eager returns weights; there aat takes the place of the eager function.
_IN_PLACE_OF_EAGER = re.compile(r"test_(attention_outputs|retain_grad_hidden_states_attentions)")


class Common:
    """To be mixed into upstream's `ModelTesterMixin`: one family of models under one set of settings."""

    make_tester: type[Tester]
    settings: dict[str, Any]
    calls: Counter[str]

    def setUp(self) -> None:
        self.model_tester = self.make_tester(self.settings)

    @contextmanager
    def subTest(self, *_: Any, **__: Any) -> Iterator[None]:
        """No report of its own: thousands of them would travel between pytest's workers."""
        yield


def select(cls: type) -> type:
    """Take out what is left out, and have the tests that run attention prove that they reached aat."""
    cls.all_model_classes = cls.make_tester.model_classes  # type: ignore[attr-defined]
    tiles = bool(cls.settings["tolerance"])  # type: ignore[attr-defined]
    for name in [name for name in dir(cls) if name.startswith("test_") and callable(getattr(cls, name))]:
        reaches, weights = REACHING.fullmatch(name), REACHING_WEIGHTS.fullmatch(name)
        if any(re.fullmatch(pattern, name) for pattern in LEFT_OUT) or (tiles and not reaches):
            setattr(cls, name, None)
        elif reaches or weights:
            setattr(cls, name, _reaching(getattr(cls, name), "tiled" if tiles else "dense"))
    return cls


def _reaching(test: Callable[..., None], path: str) -> Callable[..., None]:
    @functools.wraps(test)
    def run(self: Common, *args: Any, **kwargs: Any) -> None:
        test(self, *args, **kwargs)  # raises SkipTest where upstream skips
        assert self.calls[path], f"the test passed without a {path} call of aat: {dict(self.calls)}"

    return run


class _Listener:
    """Stands where a `Report` would: hears of every call of aat, in every model."""

    def __init__(self, calls: Counter[str]) -> None:
        self.calls = calls

    def watches(self, module: torch.nn.Module) -> bool:
        return True

    def add(self, module: torch.nn.Module, result: Any, *_: Any, **__: Any) -> None:
        self.calls[result.path] += 1

    def inspect(self, module: torch.nn.Module, *_: Any) -> None:
        pass


def _forbidden(module: torch.nn.Module, *_: Any, **__: Any) -> None:
    raise AssertionError(f"{type(module).__name__} ran sdpa in a test of aat")


@pytest.fixture
def swapped(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """aat as the default implementation, its calls counted by path, and sdpa forbidden."""
    request.cls.calls = Counter()
    monkeypatch.setattr(record, "_active", [_Listener(request.cls.calls)])
    check = PreTrainedModel.get_correct_attn_implementation

    def default_is_aat(self: PreTrainedModel, requested: str | None, *args: Any, **kwargs: Any) -> str:
        return check(self, "aat" if requested is None else requested, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "get_correct_attn_implementation", default_is_aat)
    if _IN_PLACE_OF_EAGER.fullmatch(request.node.name):
        modelling = importlib.import_module(request.cls.all_model_classes[0].__module__)
        monkeypatch.setattr(modelling, "eager_attention_forward", interface.aat_attention)
    sdpa, threads = ALL_ATTENTION_FUNCTIONS["sdpa"], torch.get_num_threads()
    AttentionInterface.register("sdpa", _forbidden)
    torch.set_num_threads(1)  # the models are tiny: more threads cost more than they give
    yield
    torch.set_num_threads(threads)
    AttentionInterface.register("sdpa", sdpa)
