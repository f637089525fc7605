"""`AATCache` beside `DynamicCache`: the same tokens whatever is done to it, and summaries that are never stale."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import transformers as tf
from caches import using
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import aat_hf
from aat_hf.hf.cache import AATLayer
from aat_hf.tiling.moments import summarise
from aat_hf.tiling.summaries import summaries_of

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
SHAPE = 3, 2, 0, 5  # batch, heads, tokens, dim


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


def states(tokens, batch=3):
    return torch.randn(batch, 2, tokens, 5), torch.randn(batch, 2, tokens, 5)


def filled(tokens=70):
    """The same tokens in a layer of each kind."""
    added = states(tokens)
    layers = AATLayer(), DynamicLayer()
    for layer in layers:
        layer.update(*added)
    return layers


def append(layers, tokens=1):
    added = states(tokens, len(layers[1].keys) if layers[1].is_initialized else 3)
    for layer in layers:
        layer.update(*added)


def check_summaries(layer, key_tile=16):
    """The summaries of the keys are those of the keys."""
    found = summaries_of(layer.keys)
    assert found is not None
    means, variances, count = found.of(layer.keys, key_tile)
    wanted = summarise(layer.keys[:, :, : count * key_tile], key_tile, 1)
    assert count == layer.keys.shape[2] // key_tile
    np.testing.assert_allclose(means[:, :, :count], wanted.mean[:, :, :, 0], atol=1e-6)
    np.testing.assert_allclose(variances[:, :, :count], wanted.variance[:, :, :, 0], atol=1e-6)


def equal(layers):
    ours, wanted = layers
    assert ours.get_seq_length() == wanted.get_seq_length()
    return torch.equal(ours.keys, wanted.keys) and torch.equal(ours.values, wanted.values)


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


OPERATIONS = {
    "crop": lambda layer: layer.crop(-23),
    "crop nothing": lambda layer: layer.crop(0),
    "crop all": lambda layer: layer.crop(-70),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([2, 0])),
    "select by mask": lambda layer: layer.batch_select_indices(torch.tensor([True, False, True])),
    "reset": lambda layer: layer.reset(),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("summarised", [True, False])
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_operations(name, summarised, mode):
    with mode():
        layers = filled()
        append(layers, 3)
        layers[0].crop(-3), layers[1].crop(-3)
        known = summaries_of(layers[0].keys)
        known.margins.next_step(3, 2)
        known.margins.log[:] = torch.arange(6).numpy()
        if summarised:
            check_summaries(layers[0])
        for layer in layers:
            OPERATIONS[name](layer)
        if name == "reset":
            assert layers[0].keys is None and layers[0].get_seq_length() == 0
            layers = layers[0], DynamicLayer()  # before Transformers 5.24 theirs kept tokens of zeros
        else:
            assert equal(layers) and summaries_of(layers[0].keys) is known
            wanted = {"reorder": [4, 5, 0, 1, 0, 1], "repeat": [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5],
                      "select": [4, 5, 0, 1], "select by mask": [0, 1, 4, 5]}.get(name, [0, 1, 2, 3, 4, 5])  # fmt: skip
            assert known.margins.log.tolist() == wanted
        for _ in range(40):
            append(layers)
        assert equal(layers)
        check_summaries(layers[0])


@torch.no_grad()
def test_operations_before_a_tile_is_complete():
    layers = filled(7)
    check_summaries(layers[0])
    for layer in layers:
        layer.batch_repeat_interleave(2)
    append(layers, 40)
    check_summaries(layers[0])
    for layer in layers:
        layer.batch_select_indices(torch.tensor([5, 1]))
    append(layers, 40)
    assert equal(layers)
    check_summaries(layers[0])


@torch.no_grad()
def test_an_empty_layer_is_left_alone():
    for operation in OPERATIONS.values():
        layer = AATLayer()
        operation(layer)
        assert layer.get_seq_length() == 0 and layer.keys is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_was_returned_stays_as_it_was(mode):
    with mode():
        layers = filled()
        seen = []
        for step in range(60):
            added = states(1)
            for layer in layers:
                returned = layer.update(*added)
                if isinstance(layer, AATLayer):
                    seen.append((*returned, *(x.clone() for x in returned)))
            if step == 30:
                for layer in layers:
                    layer.crop(-20)
            if step == 45:  # somebody puts an earlier state back
                layers[0].keys, layers[0].values = seen[5][:2]
                layers[1].keys, layers[1].values = seen[5][2:]
        assert equal(layers)
        assert all(torch.equal(k, old_k) and torch.equal(v, old_v) for k, v, old_k, old_v in seen)
        assert [summaries_of(k) for k, *_ in seen[:-1]] == [None] * (len(seen) - 1)
        check_summaries(layers[0])


CHANGES = {
    "in place": lambda layer: layer.keys.mul_(2),
    "a part": lambda layer: layer.keys[:, :, 3].zero_(),
    "detached": lambda layer: layer.keys.detach().add_(1),
    "replaced": lambda layer: setattr(layer, "keys", layer.keys * 2),
    "other memory": lambda layer: setattr(layer.keys, "data", layer.keys.data * 2),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", sorted(CHANGES))
def test_summaries_of_changed_keys_are_not_used(change, mode):
    with mode():
        layers = filled()
        check_summaries(layers[0])
        for layer in layers:
            CHANGES[change](layer)
        assert summaries_of(layers[0].keys) is None
        append(layers)
        assert equal(layers)
        check_summaries(layers[0])


@torch.no_grad()
def test_tensors_made_from_the_keys_have_no_summaries():
    layer = AATLayer()
    keys, _ = layer.update(*states(40))
    assert summaries_of(keys) is not None
    made = keys.clone(), keys[:], keys.detach(), copy.deepcopy(keys), keys.to(torch.float64), keys.view(keys.shape)
    assert [summaries_of(x) for x in made] == [None] * 6


@torch.no_grad()
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_go_their_own_way(how):
    cache, wanted = aat_hf.AATCache(), tf.DynamicCache()
    for added in (states(70), states(1)):
        for each in (cache, wanted):
            each.update(*added, 0)
    copied, apart = how(cache), copy.deepcopy(wanted)
    assert type(copied) is aat_hf.AATCache
    for here, there in ((cache, wanted), (copied, apart), (cache, wanted)):
        added = states(1)
        for each in (here, there):
            each.update(*added, 0)
    for here, there in ((cache, wanted), (copied, apart)):
        assert equal((here.layers[0], there.layers[0]))
        check_summaries(here.layers[0])
    assert len(pickle.dumps(cache)) < 1.2 * len(pickle.dumps(wanted))


@torch.no_grad()
def test_tokens_can_be_saved_and_loaded_as_tensors():
    cache, file = aat_hf.AATCache(), io.BytesIO()
    cache.update(*states(40), 0)
    torch.save([layer[:2] for layer in cache], file)
    file.seek(0)
    ((keys, values),) = torch.load(file, weights_only=True)
    assert torch.equal(keys, cache.layers[0].keys) and torch.equal(values, cache.layers[0].values)
    again = aat_hf.AATCache([(keys, values)])
    assert type(again.layers[0]) is AATLayer and equal((again.layers[0], cache.layers[0]))


@torch.no_grad()
def test_memory_grows_now_and_then():
    layer, places = AATLayer(), set()
    for _ in range(1000):
        layer.update(*states(1))
        places.add(layer.keys.data_ptr())
    assert len(places) <= 16


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
@pytest.mark.parametrize("wrong", [
    lambda k, v: (k[:1], v[:1]), lambda k, v: (k, v[:1]), lambda k, v: (k[..., :4], v), lambda k, v: (k[:, :1], v),
])  # fmt: skip
def test_tokens_of_another_shape_are_refused(wrong):
    layers = filled()
    for layer in layers:
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            layer.update(*wrong(*states(1)))


@torch.no_grad()
def test_another_dtype_is_promoted_as_by_dynamic_cache():
    layers = filled()
    added = [x.double() for x in states(1)]
    for layer in layers:
        layer.update(*added)
    assert equal(layers) and layers[0].keys.dtype == torch.float64
    append(layers)
    assert equal(layers)


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
