"""One text, several ways to run it: the same predictions within the tolerance."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from caches import using

import aat_hf

LENGTH, TOLERANCE = 1024, 0.05


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, pad_token_id=0,
    )  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="aat").eval()
    for layer in model.model.layers:  # attention far from uniform
        layer.self_attn.q_proj.weight.data.mul_(12.0)
        layer.self_attn.k_proj.weight.data.mul_(12.0)
    tiles = dict(
        query_tile=32,
        key_tile=32,
        sink_keys=32,
        local_keys=32,
        min_length=0,
        dense_prefix=64,
        max_kept=1,
        backend="cpu",
    )
    aat_hf.configure(model, tolerance=TOLERANCE, **tiles)
    return model


def total_variation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean total variation distance between predictions: logits (tokens, vocabulary)."""
    return float((a.softmax(-1) - b.softmax(-1)).abs().sum(-1).mean() / 2)


@torch.no_grad()
@pytest.mark.parametrize("decode_from", [None, 100])
def test_decoding_token_by_token_agrees_with_one_prefill(model, decode_from):
    ids = torch.randint(3, 97, (1, LENGTH))
    with aat_hf.record(model) as report:
        prefill = model(ids, use_cache=False).logits[0]
    assert report.density < 1 and 0 < report.infidelity[0] <= TOLERANCE
    cache, steps, settings = tf.DynamicCache(config=model.config), [], model.config.aat
    try:
        aat_hf.configure(model, decode_from=decode_from)
        with aat_hf.record(model) as report:
            for position in range(LENGTH):
                steps.append(model(ids[:, position : position + 1], **using(cache)).logits[0, -1])
    finally:
        model.config.aat = settings
    assert total_variation(prefill, torch.stack(steps)) <= TOLERANCE
    selected = [layer for layer in report.layers if layer.path == "skip"]
    assert len(selected) == (0 if decode_from is None else 2)
    for layer in selected:
        assert layer.calls == LENGTH - decode_from + 1 and layer.density.max() < 1
        assert 0 < layer.infidelity_mean.max() <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_agrees_with_each_sequence_alone(model, side):
    lengths = (LENGTH, 700, 333)
    ids, mask = torch.zeros(3, LENGTH, dtype=torch.long), torch.zeros(3, LENGTH, dtype=torch.long)
    rows = [torch.randint(3, 97, (length,)) for length in lengths]
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(LENGTH - len(row), LENGTH)
        ids[number, place], mask[number, place] = row, 1
    with aat_hf.record(model) as report:
        batch = model(ids, attention_mask=mask).logits
    assert report.density < 1
    for number, row in enumerate(rows):
        alone = model(row[None]).logits[0]
        assert total_variation(batch[number][mask[number].bool()], alone) <= TOLERANCE


@torch.no_grad()
def test_two_runs_are_bit_equal(model):
    ids = torch.randint(3, 97, (2, 500))
    assert torch.equal(model(ids).logits, model(ids).logits)


@torch.no_grad()
def test_assisted_decoding_with_a_second_model(model):
    torch.manual_seed(1)
    helper = tf.AutoModelForCausalLM.from_config(model.config, attn_implementation="aat").eval()
    ids = torch.randint(3, 97, (1, 300))
    how = dict(max_new_tokens=20, do_sample=False, pad_token_id=0)
    settings = model.config.aat
    try:
        aat_hf.configure(model, tolerance=0.0)
        plain = model.generate(ids, **how)
        assisted = model.generate(ids, assistant_model=helper, **how)
    finally:
        model.config.aat = settings
    assert torch.equal(plain, assisted)
