from __future__ import annotations

import pytest
import torch
import transformers as tf
from caches import using
from inputs import Largest

import aat_hf
from aat_hf import UnsupportedAttentionError

TINY = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
LLAMA = dict(**TINY, num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0)
DECODERS = {
    "gpt2": lambda: tf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=512,
                                  scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
    "llama": lambda: tf.LlamaConfig(**LLAMA),
    "mistral": lambda: tf.MistralConfig(**LLAMA, sliding_window=16),
    "qwen3": lambda: tf.Qwen3Config(**LLAMA, head_dim=12),
    "gemma2": lambda: tf.Gemma2Config(**LLAMA, head_dim=16, sliding_window=16, attn_logit_softcapping=5.0),
    "gemma3": lambda: tf.Gemma3TextConfig(**LLAMA, head_dim=16, sliding_window=16),
    "gpt_oss": lambda: tf.GptOssConfig(**LLAMA, head_dim=16, sliding_window=16, num_local_experts=2,
                                       num_experts_per_tok=1),
}  # fmt: skip


def build(config, cls=None, gain=3.0):
    torch.manual_seed(0)
    model = cls(config) if cls else tf.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # default initialisation hides errors: its attention is uniform
        parameter.data.mul_(gain)
    model = model.eval()
    aat_hf.configure(model, tolerance=0.0)
    return model


@pytest.fixture(params=sorted(DECODERS))
def decoder(request):
    return build(DECODERS[request.param]())


def both(model, call):
    results = []
    for implementation in ("eager", "aat"):
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation
        with torch.no_grad():
            results.append(call(model))
    return results


def close(a, b):
    assert torch.allclose(a, b, atol=2e-5, rtol=1e-4), float((a - b).abs().max())


def ids(batch=2, length=40):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("padding", ["none", "left", "right", "middle"])
def test_logits_equal_eager(decoder, padding):
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, {"none": slice(0, 0), "left": slice(0, 9), "right": slice(31, 40), "middle": slice(10, 15)}[padding]] = 0
    a, b = both(decoder, lambda m: m(ids(), attention_mask=mask).logits)
    close(a[mask.bool()], b[mask.bool()])


def test_packed_documents_equal_eager(decoder):
    positions = torch.cat([torch.arange(25), torch.arange(15)])[None]
    a, b = both(decoder, lambda m: m(ids(1), position_ids=positions, use_cache=False).logits)
    close(a, b)


@pytest.mark.parametrize("additive", [False, True])
def test_users_4d_masks_equal_eager(additive):
    model = build(DECODERS["llama"]())
    allowed = torch.rand(2, 1, 40, 40, generator=torch.Generator().manual_seed(2)) < 0.7
    allowed = allowed.tril() | torch.eye(40, dtype=torch.bool)
    lowest = torch.finfo(torch.float32).min
    additive_mask = torch.zeros(allowed.shape).masked_fill(~allowed, lowest)
    a, b = both(
        model,
        lambda m: (
            m(
                ids(), attention_mask=additive_mask if additive or m.config._attn_implementation == "eager" else allowed
            ).logits
        ),
    )
    close(a, b)


GENERATE = {
    "greedy": dict(do_sample=False),
    "beam": dict(do_sample=False, num_beams=3),
    "static": dict(do_sample=False, cache_implementation="static", disable_compile=True),
    "prompt_lookup": dict(do_sample=False, prompt_lookup_num_tokens=3),
    "no_cache": dict(do_sample=False, use_cache=False),
}


@pytest.mark.parametrize("values", ["all", "selected"])
@pytest.mark.parametrize("how", sorted(GENERATE))
def test_generate_equals_eager(decoder, how, values):
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    prompt, mask = (ids(2, 20), mask) if how != "prompt_lookup" else (ids(1, 20), mask[1:])
    settings = dict(max_new_tokens=8, pad_token_id=0, eos_token_id=None, **GENERATE[how])
    if values == "selected":
        aat_hf.configure(decoder, tolerance=1e-6, decode_from=0, dense_prefix=0)
    with aat_hf.record(decoder) as report:
        a, b = both(decoder, lambda m: m.generate(prompt, attention_mask=mask, **settings))
    assert torch.equal(a, b)
    singles = how not in ("no_cache", "prompt_lookup")  # steps of one token
    assert ("skip" in {layer.path for layer in report.layers}) or not singles or values == "all"


def test_chunked_prefill_and_decoding_equal_one_prefill(decoder):
    decoder.set_attn_implementation("aat")
    with torch.no_grad():
        whole = decoder(ids(1)).logits
        cache = tf.DynamicCache(config=decoder.config)
        parts = [decoder(ids(1)[:, a:b], **using(cache)).logits for a, b in ((0, 20), (20, 33), (33, 34), (34, 40))]
    close(whole, torch.cat(parts, 1))


def test_gradients_equal_eager_and_survive_padding(decoder):
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :9] = 0
    labels = ids().masked_fill(mask == 0, -100)
    labels[1, 9] = -100  # it would be predicted from a padded row, where eager attends uniformly and aat to nothing
    grads = []
    for implementation in ("eager", "aat"):
        decoder.set_attn_implementation(implementation)
        decoder.zero_grad()
        decoder(ids(), attention_mask=mask, labels=labels).loss.backward()
        grads.append({n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        assert grads[1][name].isfinite().all()
        scale = grad.abs().max().clamp(min=1e-3)
        assert ((grads[1][name] - grad) / scale).abs().max() < 2e-3, name


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = build(DECODERS["llama"]())
    model.set_attn_implementation("aat")
    model.train()
    aat_hf.configure(
        model, tolerance=0.1, min_length=0, dense_prefix=0, query_tile=16, key_tile=16, sink_keys=16, local_keys=16
    )
    losses = []
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": reentrant})
        model.zero_grad()
        loss = model(ids(), labels=ids(), use_cache=False).loss
        loss.backward()
        losses.append((loss.item(), model.model.layers[0].self_attn.q_proj.weight.grad.clone()))
    assert losses[0][0] == losses[1][0] and torch.allclose(losses[0][1], losses[1][1])


def test_output_attentions_are_true_weights(decoder):
    a, b = both(decoder, lambda m: m(ids(), output_attentions=True).attentions)
    assert len(a) == len(b) == 2
    for x, y in zip(a, b, strict=True):
        close(x, y)


def test_bert_equals_eager_with_padding():
    model = build(tf.BertConfig(**TINY), tf.BertModel)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, 28:] = 0
    a, b = both(model, lambda m: m(ids(), attention_mask=mask).last_hidden_state)
    close(a[mask.bool()], b[mask.bool()])


def test_t5_position_bias_and_cross_attention_equal_eager():
    config = tf.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = build(config, tf.T5ForConditionalGeneration, gain=1.0)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, 28:] = 0
    a, b = both(model, lambda m: m(ids(), attention_mask=mask, decoder_input_ids=ids(2, 11)).logits)
    close(a, b)
    a, b = both(model, lambda m: m.generate(ids(), attention_mask=mask, max_new_tokens=6, do_sample=False))
    assert torch.equal(a, b)


def test_compiled_equals_eager(decoder):
    decoder.set_attn_implementation("aat")
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :9] = 0
    fullgraph = decoder.config.model_type != "gpt_oss"  # its router has data-dependent shapes under SDPA too
    compiled = torch.compile(decoder, backend="aot_eager", fullgraph=fullgraph)
    with torch.no_grad():
        a, b = decoder(ids(), attention_mask=mask).logits, compiled(ids(), attention_mask=mask).logits
    close(a[mask.bool()], b[mask.bool()])


def test_a_padding_mask_stays_causal_when_compiled():
    attention = build(DECODERS["llama"]()).model.layers[0].self_attn
    q, valid = torch.randn(2, 4, 12, 8), torch.ones(2, 12, dtype=torch.bool)
    valid[1, :5] = False
    call = aat_hf.hf.interface.aat_attention
    compiled = torch.compile(lambda x: call(attention, x, x, x, valid)[0], backend="aot_eager")
    close(call(attention, q, q, q, valid)[0], compiled(q))


def test_settings_travel_with_the_checkpoint(tmp_path):
    model = build(DECODERS["llama"]())
    aat_hf.configure(model, tolerance=0.07, layers={1: {"mode": "dense"}})
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="aat")
    assert again.config._attn_implementation == "aat"
    assert again.config.aat["tolerance"] == 0.07
    assert [plan.path for plan in aat_hf.explain(again)] == ["tiled", "dense"]
    assert tf.AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_record_reports_every_layer():
    model = build(DECODERS["llama"]())
    model.set_attn_implementation("aat")
    aat_hf.configure(
        model,
        tolerance=0.2,
        min_length=0,
        dense_prefix=0,
        query_tile=16,
        key_tile=16,
        sink_keys=16,
        local_keys=16,
        max_kept=1.0,
    )
    with aat_hf.record(model, keep_maps=True) as report, torch.no_grad():
        model(ids(1, 400))
    assert [r.path for r in report.layers] == ["tiled", "tiled"]
    assert 0 < report.density <= 1
    assert report.infidelity[0] <= 0.2 and report.infidelity[1] >= 0
    assert set(report.milliseconds) == {"select", "compute", "audit"}
    assert report.layers[0].tile_map.shape == (1, 4, 25, 25)
    assert "infidelity" in report.to_json() and "layers.0" in str(report)


def test_short_calls_say_why_they_are_dense():
    model = build(DECODERS["llama"]())
    model.set_attn_implementation("aat")
    aat_hf.configure(model, tolerance=0.1)
    with aat_hf.record(model) as report, torch.no_grad():
        model(ids(1))
    assert {r.reason for r in report.layers} == {"40 keys are fewer than min_length = 2048"}


def test_what_would_be_wrong_is_refused():
    model = build(DECODERS["llama"]())
    model.set_attn_implementation("aat")
    q = torch.randn(1, 4, 5, 8)
    for name in ("indices", "block_indices", "cache"):
        with pytest.raises(UnsupportedAttentionError, match="sdpa"):
            aat_hf.hf.interface.aat_attention(model.model.layers[0].self_attn, q, q, q, None, **{name: object()})
    with pytest.raises(TypeError, match="attention_mask is str"):
        aat_hf.hf.interface.aat_attention(model.model.layers[0].self_attn, q, q, q, "mask")


@pytest.mark.parametrize("name", ["Bloom", "Mpt", "GPTNeo", "XLNet"])
def test_models_that_would_ignore_the_name_are_refused(name):
    config = getattr(tf, f"{name}Config")()
    with pytest.raises(ValueError, match=f"{name}.*silently ignored"), torch.device("meta"):
        tf.AutoModel.from_config(config, attn_implementation="aat")


@pytest.mark.parametrize("backend", ["cpu", "gather"])
def test_one_padded_call_tiles_with_linear_memory(backend):
    """Padded, 4096 tokens, tiny head: no tensor of the call reaches N x N elements of one head."""
    q = torch.randn(1, 1, 4096, 8)
    padding = torch.ones(1, 4096, dtype=torch.bool)
    padding[0, :100] = False
    mask = aat_hf.tiling.masks.causal_mask(4096, 4096, q.device, key_valid=padding)
    with Largest() as largest:
        aat_hf.tiled_attention(q, q, q, attn_mask=mask, config=aat_hf.AATConfig(tolerance=0.05, backend=backend))
    assert largest.seen < 4096 * 4096 / 4
