from __future__ import annotations

import json
import math

import pytest
import torch
from inputs import peaked
from transformers import LlamaConfig, LlamaForCausalLM

import aat_hf
from aat_hf import AATConfig, QuantumGeometricAttention, tiled_attention
from aat_hf.report.metrics import OBSERVABLES, Observable, describe, observables, register_observable
from aat_hf.tiling.masks import causal_mask
from aat_hf.tiling.tile_map import TileMap


def uniform(n: int, heads: int = 1) -> torch.Tensor:
    return torch.full((1, heads, n, n), 1 / n)


def causal_uniform(n: int) -> torch.Tensor:
    return (torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None])[None, None]


def only(weights: torch.Tensor, name: str, **kwargs) -> float:
    found = observables(weights, [name], **kwargs)
    assert list(found) == [name] and found[name].shape[:2] == weights.shape[:2]
    return found[name][0, 0].item()


def test_closed_forms_of_uniform_and_one_hot_rows():
    n = 16
    same, own = uniform(n), torch.eye(n)[None, None]
    assert only(same, "entropy") == pytest.approx(math.log(n), rel=1e-6) and only(own, "entropy") == 0
    assert only(same, "fisher_length") == 0 and only(own, "fisher_length") == pytest.approx(math.pi, rel=1e-6)
    assert only(same, "effective_rank") == pytest.approx(1, rel=1e-5)
    assert only(own, "effective_rank") == pytest.approx(n, rel=1e-5)
    energies = observables(same, ["scale_energies"])["scale_energies"][0, 0]
    assert torch.allclose(energies, torch.tensor([0.0, 0, 0, 0, 1]), atol=1e-6)
    assert observables(own)["scale_energies"].sum().item() == pytest.approx(1, rel=1e-6)


def test_entropy_and_length_of_causal_uniform_rows():
    n = 12
    weights = causal_uniform(n)
    assert only(weights, "entropy") == pytest.approx(sum(math.log(i) for i in range(1, n + 1)) / n, rel=1e-6)
    steps = [2 * math.acos(math.sqrt(i / (i + 1))) for i in range(1, n)]
    assert only(weights, "fisher_length") == pytest.approx(sum(steps) / len(steps), rel=1e-6)


def test_commutator_norm_of_permutations():
    swap, turn = torch.eye(3)[[1, 0, 2]], torch.eye(3)[[1, 2, 0]]
    found = observables(torch.stack([swap, turn, torch.eye(3)])[None], ["commutator_norm"])["commutator_norm"][0]
    pair = float((swap @ turn - turn @ swap).norm()) / (2 * 3)
    assert torch.allclose(found, torch.tensor([pair / 2, pair / 2, 0.0]), atol=1e-6)
    assert only(uniform(4), "commutator_norm") == 0


@pytest.mark.parametrize(("name", "value"), [("forman_curvature", 6.0), ("ollivier_curvature", 4 / 5)])
def test_curvature_of_a_complete_tile_graph(name, value):
    n, tile = 96, 16
    tiles = TileMap.dense(causal_mask(n, n, torch.device("cpu")), 1, 1, tile, tile)
    assert only(causal_uniform(n), name, tile_map=tiles) == pytest.approx(value)  # K6
    weights = 0.5 * torch.eye(6).roll(1, 0) + 0.5 * torch.eye(6).roll(-1, 0)
    assert only(weights[None, None], name, tile=1) == pytest.approx(0.0, abs=1e-9)  # C6
    assert math.isnan(only(torch.eye(6)[None, None], name, tile=1))  # no edges


def test_fidelity_is_the_mass_kept_and_agrees_with_the_audit(small):
    q, k, v = peaked(1, 2, 1, 512, 512, 16, dtype=torch.float64)
    result = tiled_attention(q, k, v, config=small.replace(audit_rows=512), is_causal=True)
    exact = tiled_attention(q, k, v, config=small, is_causal=True, need_weights=True).weights
    found = observables(exact, ["fidelity"], tile_map=result.tile_map)["fidelity"]
    kept = result.tile_map.exact.repeat_interleave(32, 2).repeat_interleave(32, 3)
    assert (found < 1).all()
    assert torch.allclose(found, (exact * kept).sum(-1).mean(-1), atol=1e-9)
    assert ((1 - found - result.audit.mean).abs() <= result.audit.half_width + 1e-6).all()


def test_rows_without_keys_do_not_count():
    weights = uniform(8)
    weights[..., :3, :] = 0
    for name, value in (("entropy", math.log(8)), ("fisher_length", 0.0), ("effective_rank", 1.0)):
        assert only(weights, name) == pytest.approx(value, abs=1e-5)


def test_defaults_are_cheap_and_fit_the_arguments():
    weights = torch.softmax(torch.randn(2, 3, 10, 14), -1)
    assert set(observables(weights)) == {"entropy", "fisher_length", "scale_energies"}
    assert set(observables(causal_uniform(10))) == {"entropy", "fisher_length", "scale_energies", "forman_curvature"}
    for name, value in observables(weights, ["entropy", "effective_rank", "scale_energies"]).items():
        alone = torch.cat([observables(weights[:, h : h + 1], [name])[name] for h in range(3)], 1)
        assert torch.allclose(value, alone, atol=1e-6)


def test_every_observable_states_its_cost():
    table = describe()
    for name, observable in OBSERVABLES.items():
        assert name in table and observable.cost.startswith("O(") and observable.cost in table
        assert f"- {name}, {observable.cost}:" in aat_hf.report.metrics.__doc__


def test_a_users_own_observable():
    register_observable("peak", Observable(lambda heads: heads.weights.amax(-1).mean(-1), "O(n^2)"))
    try:
        assert only(uniform(8), "peak") == pytest.approx(1 / 8)
    finally:
        OBSERVABLES.pop("peak")


@pytest.mark.parametrize(
    ("shape", "names", "message"),
    [
        ((1, 1, 4, 4), ["entropie"], "no observable entropie: must be of entropy"),
        ((1, 1, 4, 4), ["fidelity"], "fidelity needs the tile map"),
        ((1, 1, 4, 5), ["commutator_norm"], "commutator_norm needs as many queries as keys"),
        ((4, 4), None, "batch, heads, queries, keys"),
    ],
)
def test_what_cannot_be_observed_is_an_error(shape, names, message):
    with pytest.raises(ValueError, match=message):
        observables(torch.ones(shape), names)


def test_a_map_of_other_attention_is_an_error():
    tiles = TileMap.dense(causal_mask(64, 64, torch.device("cpu")), 1, 2, 32, 32)
    with pytest.raises(ValueError, match="is not of weights"):
        observables(uniform(64), tile_map=tiles)


def test_the_module_offers_observables():
    attention = QuantumGeometricAttention(32, 4, tile_size=32, num_kv_heads=2, is_causal=True, tolerance=0.3,
                                          min_length=0, dense_prefix=0, backend="gather", max_kept=1.0)  # fmt: skip
    attention(torch.randn(2, 256, 32))
    plain, more = attention.get_metrics(), attention.get_metrics(["entropy", "fidelity", "effective_rank"])
    assert plain["path"] == "tiled" and set(more) - set(plain) == {"entropy", "fidelity", "effective_rank"}
    assert more["fidelity"].shape == (2, 4) and more["density"] == plain["density"]
    assert (more["entropy"] < math.log(256)).all() and (more["fidelity"] > 0.5).all()
    with pytest.raises(ValueError, match="no observable"):
        attention.get_metrics(["no such"])


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, attn_implementation="aat",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    aat_hf.configure(model, tolerance=0.3, query_tile=32, key_tile=32, min_length=0, dense_prefix=0, max_kept=1.0,
                     backend="gather", layers={1: {"mode": "dense"}})  # fmt: skip
    return model


def test_the_report_has_patterns_and_observables(llama):
    wanted = ["entropy", "fidelity", "scale_energies"]
    with torch.no_grad(), aat_hf.record(llama, observables=wanted) as report:
        llama(torch.randint(0, 97, (2, 512)))
    tiled, dense = report.layers
    assert (tiled.path, dense.path) == ("tiled", "dense")
    assert set(tiled.observables) == set(wanted) and set(dense.observables) == {"entropy", "scale_energies"}
    assert tiled.observables["fidelity"].shape == (4,) and tiled.observables["scale_energies"].shape == (4, 10)
    lost = 1 - tiled.observables["fidelity"]
    assert ((lost - tiled.infidelity_mean).abs() <= tiled.infidelity_half_width + 1e-3).all()
    assert len(tiled.patterns.names[0]) == 4 and dense.patterns is None
    layers = json.loads(report.to_json())["layers"]
    assert layers[0]["patterns"] == tiled.patterns.names[0] and layers[1]["patterns"] is None
    assert layers[0]["observables"]["entropy"] == pytest.approx(tiled.observables["entropy"].tolist())
    assert any(f" {name}" in str(report).splitlines()[1] for name in tiled.patterns.names[0])


def test_the_report_refuses_what_it_cannot_observe(llama, monkeypatch):
    with pytest.raises(ValueError, match="no observable"), aat_hf.record(llama, observables=["no such"]):
        pass
    monkeypatch.setattr("aat_hf.report.record._MOST_WEIGHTS", 10_000)
    with pytest.raises(ValueError, match="record a shorter text"), aat_hf.record(llama, observables=["entropy"]):
        llama(torch.randint(0, 97, (1, 64)))


def test_exact_calls_have_no_pattern():
    with pytest.raises(RuntimeError, match="call the module first"):
        QuantumGeometricAttention(16, 2).get_metrics()
    attention = QuantumGeometricAttention(16, 2)
    attention(torch.randn(1, 8, 16))
    assert attention.config == AATConfig() and attention.get_metrics()["path"] == "dense"
    with pytest.raises(ValueError, match="fidelity needs the tile map"):
        attention.get_metrics(["fidelity"])
