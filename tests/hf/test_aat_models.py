"""The model types "aat-gpt2" and "aat-bert"."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import transformers as tf

import aat_hf
from aat_hf.geometry import Lorentz
from aat_hf.hf.settings import settings_of

GPT2 = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=1)
BERT = dict(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=256,
)
KINDS = {
    "lm": (tf.AutoModelForCausalLM, tf.GPT2Config, aat_hf.AATGPT2Config, GPT2),
    "gpt2": (tf.AutoModel, tf.GPT2Config, aat_hf.AATGPT2Config, GPT2),
    "mlm": (tf.AutoModelForMaskedLM, tf.BertConfig, aat_hf.AATBertConfig, BERT),
    "bert": (tf.AutoModel, tf.BertConfig, aat_hf.AATBertConfig, BERT),
    "classify": (tf.AutoModelForSequenceClassification, tf.BertConfig, aat_hf.AATBertConfig, BERT),
}


def ids(length=40):
    return torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(1))


def lively(model):
    """Default initialisation hides errors: its attention is uniform."""
    for name, parameter in model.named_parameters():
        if "aat_curvature" not in name:
            parameter.data.mul_(3)
    return model.eval()


@torch.no_grad()
def outputs(model):
    return model.eval()(ids())[0]


@pytest.fixture(params=sorted(KINDS))
def kind(request):
    return KINDS[request.param]


def test_ordinary_checkpoints_load_unchanged(kind, tmp_path):
    auto, stock, ours, sizes = kind
    model = lively(auto.from_config(stock(**sizes)))
    model.save_pretrained(tmp_path)
    cls = type(auto.from_config(ours(**sizes)))
    loaded, info = cls.from_pretrained(tmp_path, aat={"tolerance": 0.0}, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(loaded).__name__.startswith("AAT") and loaded.config._attn_implementation == "aat"
    assert torch.allclose(outputs(loaded), outputs(model), atol=1e-5)


def test_round_trip_by_auto_classes(kind, tmp_path):
    auto, _, ours, sizes = kind
    layers = {"1": {"tolerance": 0.3}}
    model = lively(auto.from_config(ours(**sizes, aat={"tolerance": 0.1, "layers": layers}, geometry="hyperbolic")))
    model.save_pretrained(tmp_path)
    assert [f for f in os.listdir(tmp_path) if f.endswith((".safetensors", ".bin"))] == ["model.safetensors"]
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["aat"] == {"tolerance": 0.1, "layers": layers, "geometry": "hyperbolic"}
    assert "attn_implementation" not in str(stored)  # it would bind the repository to one implementation
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and loaded.config.geometry == "hyperbolic"
    assert [settings_of(loaded.config, layer).tolerance for layer in (0, 1)] == [0.1, 0.3]
    assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_an_implementation_that_is_asked_for_stays(kind, name):
    auto, _, ours, sizes = kind
    model = auto.from_config(ours(**sizes), attn_implementation=name)
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {name}


def test_stock_class_opens_the_folder(tmp_path):
    model = lively(tf.AutoModelForCausalLM.from_config(aat_hf.AATGPT2Config(**GPT2, aat={"tolerance": 0.0})))
    model.save_pretrained(tmp_path)
    assert torch.allclose(outputs(tf.GPT2LMHeadModel.from_pretrained(tmp_path)), outputs(model), atol=1e-5)


def test_pickled_weights_are_not_read(tmp_path):
    model = tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        aat_hf.AATGPT2LMHeadModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("where", ["load", "set"])
def test_implementations_that_know_no_geometry_are_refused(where):
    config = aat_hf.AATGPT2Config(**GPT2, geometry="spherical")
    with pytest.raises(ValueError, match='"sdpa" would ignore the geometry "spherical"'):
        if where == "load":
            tf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        else:
            tf.AutoModelForCausalLM.from_config(config).set_attn_implementation("sdpa")


def test_settings_are_checked():
    with pytest.raises(ValueError, match="AATConfig has no field speed"):
        aat_hf.AATGPT2Config(aat={"speed": 9})
    with pytest.raises(ValueError, match="geometry = 'round'"):
        aat_hf.AATGPT2Config(geometry="round")
    with pytest.raises(ValueError, match="without a curved layer"):
        aat_hf.AATGPT2LMHeadModel(aat_hf.AATGPT2Config(**GPT2, learn_curvature=True))


def test_hyperbolic_layers_attend_by_distance():
    config = aat_hf.AATBertConfig(**BERT, geometry="hyperbolic", aat={"tolerance": 0.0, "curvature": 0.5})
    model = lively(aat_hf.AATBertModel(config))
    with torch.no_grad():
        out = model(ids(), output_attentions=True, output_hidden_states=True)
        attention = model.encoder.layer[0].attention.self
        q, k = (
            layer(out.hidden_states[0]).unflatten(-1, (4, 8)).transpose(1, 2)
            for layer in (attention.query, attention.key)
        )
    q, k = (torch.nn.functional.pad(x.double(), (1, 0)) for x in (q, k))
    distance = Lorentz(0.5).dist(q[:, :, :, None], k[:, :, None])
    expected = torch.softmax(-torch.cosh(math.sqrt(0.5) * distance) / 0.5 / math.sqrt(8), -1)
    assert torch.allclose(out.attentions[0].double(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["lm", "mlm"])
@pytest.mark.parametrize(("geometry", "start"), [("hyperbolic", 1.0), ("spherical", 1 / 8)])
def test_curvature_is_learnt_by_head(kind, geometry, start, tmp_path):
    auto, _, ours, sizes = KINDS[kind]
    model = lively(auto.from_config(ours(**sizes, geometry=geometry, learn_curvature=True, aat={"tolerance": 0.0})))
    model(ids(), labels=ids()).loss.backward()
    curvatures = [module for name, module in model.named_modules() if name.endswith("aat_curvature")]
    assert len(curvatures) == 2
    for curvature in curvatures:
        assert torch.allclose(curvature(), torch.full((4,), start))
        assert (curvature.raw.grad != 0).all()
        torch.nn.init.uniform_(curvature.raw)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(auto.from_pretrained(tmp_path)), outputs(model))


def test_curvature_starts_afresh_on_an_ordinary_checkpoint(tmp_path):
    tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)).save_pretrained(tmp_path)
    model = aat_hf.AATGPT2LMHeadModel.from_pretrained(
        tmp_path, learn_curvature=True, aat={"geometry": "hyperbolic", "curvature": 0.25}
    )
    assert torch.allclose(model.transformer.h[1].attn.aat_curvature(), torch.full((4,), 0.25))


def test_long_calls_are_tiled_and_generation_works(small):
    model = lively(aat_hf.AATGPT2LMHeadModel(aat_hf.AATGPT2Config(**GPT2, geometry="hyperbolic")))
    changes = {name: value for name, value in small.to_dict().items() if name not in ("geometry", "curvature")}
    aat_hf.configure(model, **changes)
    how = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad(), aat_hf.record(model) as report:
        found = model.generate(ids(200), **how)
        again = model.generate(ids(200), **how, cache_implementation="static", disable_compile=True)
    assert {layer.path for layer in report.layers} == {"tiled", "dense"}
    assert torch.equal(found, again)


HUB = """
import sys
if {absent}:
    sys.modules["aat_hf"] = None
import torch, transformers as tf
try:
    model = tf.AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True)
except ImportError as error:
    sys.exit(f"ImportError: {{error}}")
assert type(model).__module__.startswith("transformers_modules"), type(model)
assert model.config._attn_implementation == "aat"
torch.save(model.eval()(torch.tensor({ids!r})).logits.detach(), {out!r})
"""


@pytest.mark.parametrize("absent", [True, False])
def test_hub_code(absent, tmp_path):
    folder = tmp_path / "repository"
    config = aat_hf.AATGPT2Config(**GPT2, geometry="hyperbolic", learn_curvature=True)
    model = lively(aat_hf.AATGPT2LMHeadModel(config))
    model.save_pretrained(folder)
    code = HUB.format(absent=absent, folder=str(folder), ids=ids().tolist(), out=str(tmp_path / "logits.pt"))
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if absent:
        assert done.returncode == 1
        assert done.stderr.strip().endswith("which the package aat-hf provides: pip install aat-hf"), done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert torch.equal(torch.load(tmp_path / "logits.pt"), outputs(model))
