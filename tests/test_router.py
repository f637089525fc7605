"""Tiled or exact by measured costs; calibration; the benchmarks run and check themselves."""

from __future__ import annotations

import json

import pytest
import torch
from inputs import peaked

import aat_hf
from aat_hf import AATConfig, cli, tiled_attention
from aat_hf.bench import attention as bench_attention
from aat_hf.kernels import router

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_profile(tmp_path, monkeypatch):
    monkeypatch.setenv("AAT_CACHE", str(tmp_path))
    router.measured.cache_clear()
    yield
    router.measured.cache_clear()


def entry(**changes):
    return {"device": "cpu", "dtype": "float32", "head_dim": 64, "forward": 0.8, "backward": 0.9, "shortest": 512,
            **changes}  # fmt: skip


def test_the_nearest_measured_head_dimension_counts():
    assert router.costs(CPU, torch.float32, 64) == router.default_costs(torch.get_num_threads())
    router.save([entry(), entry(head_dim=128, forward=0.5)])
    assert router.costs(CPU, torch.float32, 80).forward == 0.8
    assert router.costs(CPU, torch.float32, 200).forward == 0.5
    assert router.costs(CPU, torch.bfloat16, 64) == router.default_costs(torch.get_num_threads())
    assert router.costs(CPU, torch.float64, 64).forward == 3.0


def test_more_threads_tile_longer_calls_only():
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 16):
            torch.set_num_threads(threads)
            found.append(router.shortest(AATConfig(), CPU, torch.float32, 64))
    finally:
        torch.set_num_threads(before)
    assert found == [2048, 2048, 8192]


def test_a_broken_or_foreign_profile_is_not_used(caplog):
    router.save([entry()])
    stored = json.loads(router.profile_path().read_text())
    for spoilt, warns in ((stored | {"version": 99}, False), (stored | {"machine": {"processor": "?"}}, False),
                          (stored | {"costs": [{"device": "cpu"}]}, True), ("not a profile", True)):  # fmt: skip
        router.profile_path().write_text(json.dumps(spoilt))
        router.measured.cache_clear()
        caplog.clear()
        assert router.costs(CPU, torch.float32, 64) == router.default_costs(torch.get_num_threads())
        assert bool(caplog.records) == warns


def test_the_file_can_be_ignored(monkeypatch):
    router.save([entry()])
    monkeypatch.setenv("AAT_PROFILE", "none")
    router.measured.cache_clear()
    assert router.costs(CPU, torch.float32, 64) == router.default_costs(torch.get_num_threads())


def test_dense_maps_go_to_exact_attention_unless_a_backend_is_named(small):
    q, k, v = peaked(1, 2, 2, 512, 512, 16)
    router.save([entry(head_dim=16, forward=50.0)])
    routed = tiled_attention(q, k, v, config=small.replace(backend="auto"), is_causal=True)
    assert routed.path == "dense" and routed.reason.startswith(router.FASTER)
    assert tiled_attention(q, k, v, config=small.replace(backend="cpu"), is_causal=True).path == "tiled"


def test_measured_length_decides_unless_the_user_does():
    router.save([entry(shortest=300)])
    assert router.shortest(AATConfig(), CPU, torch.float32, 64) == 300
    assert router.shortest(AATConfig(min_length=7), CPU, torch.float32, 64) == 7


def test_a_layer_whose_selection_was_in_vain_is_asked_again_later():
    layer, config = torch.nn.Module().eval(), AATConfig()
    router.remember(layer, 4096, config, f"{router.FASTER} at density 1")
    assert not router.lost_lately(layer, 8192, config)
    assert not router.lost_lately(layer, 4096, config.replace(tolerance=0.5))  # other settings may keep less
    assert sum(router.lost_lately(layer, 4096, config.replace()) for _ in range(100)) == router._RETRY
    router.remember(layer, 4096, config, f"{router.FASTER} at density 1")
    assert not router.lost_lately(layer.train(), 4096, config)


def test_calibrate_writes_what_the_router_reads(capsys):
    assert cli.main(["calibrate", "--rounds", "1", "--head-dims", "16", "--heads", "1"]) == 0
    assert "head_dim 16" in capsys.readouterr().out
    found = router.costs(CPU, torch.float32, 16)
    assert found.forward > 0 and found.backward > 0 and found.shortest in (512, 1024, 2048, 4096, 8192, 16384)


def test_bench_attention_prints_ratios(capsys, tmp_path):
    out = tmp_path / "a.csv"
    args = ["bench", "attention", "--lengths", "300", "--densities", "1", "0.3", "--heads", "2", "--kv-heads", "1",
            "--head-dim", "16", "--rounds", "1", "--backward", "--out", str(out)]  # fmt: skip
    assert cli.main(args) == 0
    assert capsys.readouterr().out.count("kernel forward") == 2
    assert len(out.read_text().splitlines()) == 5


def test_bench_attention_reports_no_time_of_a_wrong_kernel(monkeypatch):
    right = bench_attention._KERNELS["cpu"]
    monkeypatch.setitem(bench_attention._KERNELS, "cpu", lambda *a: (right(*a)[0] * 1.01, right(*a)[1]))
    with pytest.raises(bench_attention.NumericalError):
        cli.main(["bench", "attention", "--lengths", "300", "--densities", "1", "--heads", "1", "--kv-heads", "1",
                  "--rounds", "1"])  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "decoding single tokens is exact below 18000 keys"),
        ({"mode": "skip"}, "decoding single tokens is exact below 18000 keys"),
        ({"decode_from": 4096}, "decoding single tokens is exact below 4096 keys"),
        ({"coarse": True}, "decoding single tokens is exact"),
        ({"backend": "gather"}, "decoding single tokens is exact"),
    ],
)
def test_explain_says_from_where_on_decoding_selects(changes, told, monkeypatch):
    import transformers as tf

    monkeypatch.setattr(router, "_DECODE_PER_THREAD", 9000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    config = tf.LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                            num_attention_heads=2, pad_token_id=0)  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="aat")
    aat_hf.configure(model, **changes)
    (plan,) = aat_hf.explain(model, 8192)
    assert plan.path == changes.get("mode", "tiled") and plan.reason.endswith(f"; {told}")


def test_short_calls_are_exact_and_recorded():
    """A short call goes to SDPA at once; while somebody listens it is seen with its reason, and computes the same."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="aat").eval()
    ids = torch.randint(3, 97, (2, 40))
    padding = torch.ones_like(ids)
    padding[1, :7] = 0
    for attention_mask in (None, padding):
        with torch.no_grad():
            model.set_attn_implementation("sdpa")
            expected = model(ids, attention_mask=attention_mask).logits
            model.set_attn_implementation("aat")
            found = model(ids, attention_mask=attention_mask).logits
            with aat_hf.record(model) as report:
                recorded = model(ids, attention_mask=attention_mask).logits
        seen = padding.bool() if attention_mask is not None else torch.ones_like(ids).bool()
        assert torch.allclose(found[seen], expected[seen], atol=1e-5) and torch.equal(found[seen], recorded[seen])
        assert [layer.reason for layer in report.layers] == ["40 keys are fewer than min_length = 2048"] * 2


def test_a_tiled_model_layer_that_is_too_dense_says_so():
    import transformers as tf

    torch.manual_seed(0)
    config = tf.LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                            num_attention_heads=2, pad_token_id=0)  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="aat").eval()
    aat_hf.configure(
        model, tolerance=0.001, query_tile=32, key_tile=32, sink_keys=32, local_keys=32, min_length=0, dense_prefix=0
    )
    ids = torch.randint(3, 97, (1, 300))
    reasons = []
    for _ in range(2):
        with torch.no_grad(), aat_hf.record(model) as report:
            model(ids)
        reasons.append(report.layers[0].reason)
    assert all(reason.startswith(router.FASTER) for reason in reasons) and "last maps" in reasons[1]
