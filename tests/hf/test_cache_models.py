"""Models with an `AATCache` beside models with a `DynamicCache`: logits, generation, gradients, reports."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from caches import using
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import aat_hf
from aat_hf.hf.cache import AATLayer

pytestmark = pytest.mark.usefixtures("one_thread")
LLAMA = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0)  # fmt: skip
CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**LLAMA),
    "qwen3": lambda: tf.Qwen3Config(**LLAMA, head_dim=12),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **LLAMA, head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    ),
}
SELECTING = dict(
    tolerance=1e-6, decode_from=0, dense_prefix=0, sink_keys=0, local_keys=0, max_kept=1.0, min_length=10**6
)


def build(name, implementation="aat"):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation=implementation).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3.0)
    aat_hf.configure(model, **SELECTING)
    return model


@pytest.fixture(params=sorted(CONFIGS))
def model(request):
    return build(request.param)


def ids(batch=2, length=90):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["aat", "sdpa"])
def test_token_by_token_as_with_dynamic_cache(model, implementation):
    model.set_attn_implementation(implementation)
    caches = aat_hf.AATCache(config=model.config), tf.DynamicCache(config=model.config)
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[1, :9] = 0
    parts = [(0, 50), (50, 63), *((i, i + 1) for i in range(63, 90))]
    for start, end in parts:
        step = ids()[:, start:end], mask[:, :end]
        a, b = (model(step[0], attention_mask=step[1], **using(cache)).logits for cache in caches)
        alive = step[1][:, start:end].bool()
        torch.testing.assert_close(a[alive], b[alive], atol=2e-4, rtol=1e-4)
    for ours, wanted in zip(*(cache.layers for cache in caches), strict=True):
        torch.testing.assert_close(ours.keys, wanted.keys, atol=1e-4, rtol=1e-4)
        assert type(ours) is (AATLayer if type(wanted) is DynamicLayer else DynamicSlidingWindowLayer)


GENERATE = {
    "greedy": dict(do_sample=False),
    "beam": dict(do_sample=False, num_beams=3),
    "sequences": dict(do_sample=False, num_beams=4, num_return_sequences=2),
    "prompt_lookup": dict(do_sample=False, prompt_lookup_num_tokens=3),
    "assisted": dict(do_sample=False, assistant_model=True),
}


@pytest.mark.parametrize("how", sorted(GENERATE))
def test_generate_as_with_dynamic_cache(model, how):
    settings = dict(max_new_tokens=9, pad_token_id=0, eos_token_id=None, **GENERATE[how])
    alone = how in ("prompt_lookup", "assisted")
    if alone and model.config.model_type != "llama":
        return  # their sliding layers cannot be cropped unless `generate` made the cache
    if "assistant_model" in settings:
        settings["assistant_model"] = build("llama")
    prompt = ids(1 if alone else 2, 70)
    mask = torch.ones_like(prompt)
    mask[0, : 0 if alone else 6] = 0
    with aat_hf.record(model) as report:
        caches = aat_hf.AATCache(config=model.config), tf.DynamicCache(config=model.config)
        a, b = (model.generate(prompt, attention_mask=mask, **using(cache), **settings) for cache in caches)
    assert torch.equal(a, b)
    assert ("tiled" in {layer.path for layer in report.layers}) or alone


def test_gradients_flow_as_with_dynamic_cache(model):
    found = []
    for cache in (aat_hf.AATCache(config=model.config), tf.DynamicCache(config=model.config)):
        with torch.no_grad():
            model(ids()[:, :40], **using(cache))
            model(ids()[:, 40:41], **using(cache))
        model.zero_grad()
        first = model(ids()[:, 41:60], **using(cache)).logits
        second = model(ids()[:, 60:61], **using(cache)).logits
        with torch.no_grad():  # what the graph refers to stays as it is
            model(ids()[:, 61:62], **using(cache))
        (first.square().mean() + second.square().mean()).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 8
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_compiled_as_with_dynamic_cache():
    model = build("llama")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    parts, found = ((0, 30), (30, 31), (31, 32), (32, 33)), []
    for cache, steps in ((aat_hf.AATCache(), [*[compiled] * 3, model]), (tf.DynamicCache(), [model] * 4)):
        logits = [step(ids()[:, a:b], **using(cache)).logits for (a, b), step in zip(parts, steps, strict=True)]
        found.append(torch.cat(logits, 1))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_a_cache_begun_in_inference_mode_goes_on_outside():
    model = build("llama")
    cache, found = aat_hf.AATCache(config=model.config), []
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            steps = range(40) if not found else range(2)
            for _ in steps:
                position = cache.get_seq_length()
                found.append(model(ids()[:, position : position + 1], **using(cache)).logits)
    with torch.no_grad():
        whole = model(ids()[:, :44]).logits
    torch.testing.assert_close(torch.cat([x.clone() for x in found], 1), whole, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_the_report_tells_decoding_steps_apart_and_says_what_was_measured():
    model = build("llama")
    aat_hf.configure(model, min_length=0, query_tile=16, audit_rows=8, tolerance=0.05, backend="cpu")
    cache = aat_hf.AATCache(config=model.config)
    with aat_hf.record(model) as report:
        model(ids(1, 60), **using(cache))
        for position in range(60, 90):
            model(ids(1)[:, position : position + 1], **using(cache))
    prefill, decoding = ([r for r in report.layers if (r.calls > 1) == many] for many in (False, True))
    assert len(prefill) == len(decoding) == 2
    for record in decoding:
        assert record.path == "tiled" and record.reason is None and record.calls == 30
        assert record.infidelity.shape == (4, 4 + 30 // 17)  # heads, steps that were measured
        assert record.density.max() <= 1 and record.estimated.max() < 0.3
    assert "30" in str(report)


@torch.no_grad()
def test_a_certificate_asks_for_all_scores():
    model = build("llama")
    aat_hf.configure(model, mode="skip", tolerance=0.05)
    cache = aat_hf.AATCache(config=model.config)
    with aat_hf.record(model) as report:
        for position in range(40):
            model(ids(1)[:, position : position + 1], **using(cache))
    assert {(r.path, r.infidelity.shape[1]) for r in report.layers} == {("skip", 40)}
    assert all(r.infidelity.max() <= 0.05 + 1e-6 for r in report.layers)
