"""Settings in nested model configs."""

from __future__ import annotations

import torch
import transformers as tf

import aat_hf
from aat_hf.hf.settings import settings_of


def test_nested_configs_carry_the_settings(tmp_path):
    config = tf.CLIPConfig()
    aat_hf.configure(config, tolerance=0.07)
    config.save_pretrained(tmp_path)
    loaded = tf.CLIPConfig.from_pretrained(tmp_path)
    for part in (loaded, loaded.text_config, loaded.vision_config):
        assert settings_of(part).tolerance == 0.07


def test_a_model_of_two_parts_runs_in_both():
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = tf.CLIPConfig(
        text_config=dict(**small, vocab_size=99, eos_token_id=98, max_position_embeddings=16),
        vision_config=dict(**small, image_size=8, patch_size=4),
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = tf.CLIPModel(config).eval()
    inputs = dict(input_ids=torch.randint(0, 98, (2, 9)), pixel_values=torch.randn(2, 3, 8, 8))
    inputs["input_ids"][:, -1] = 98
    logits = {}
    for name in ("eager", "aat"):
        model.set_attn_implementation(name)
        with torch.no_grad(), aat_hf.record(model) as report:
            logits[name] = model(**inputs).logits_per_text
        assert bool(report.layers) == (name == "aat")
    assert {layer.name.split("_")[0] for layer in report.layers} == {"text", "vision"}
    assert torch.allclose(logits["eager"], logits["aat"], atol=1e-5)
