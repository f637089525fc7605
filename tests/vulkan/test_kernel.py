"""Tiled attention on a Vulkan device against float64, on every provider; small shapes, the software driver is slow."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import peaked
from kernel_cases import CPU, MASKS, inputs, oracle, random_map
from parity import check, distance, gradients, masks, run
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import aat_hf
from aat_hf.attention import tiled_attention
from aat_hf.kernels import vulkan as kernel
from aat_hf.kernels.cpu import cpu_attention
from aat_hf.kernels.reference import reference_attention
from aat_hf.kernels.vulkan import vulkan_attention, vulkan_skip_attention
from aat_hf.tiling.masks import causal_mask, full_mask
from aat_hf.tiling.tile_map import TileMap
from aat_hf.vulkan import limits, lowering, profile, workspace
from aat_hf.vulkan import shapes as workgroups
from aat_hf.vulkan.buffers import BufferPool
from aat_hf.vulkan.errors import OutOfDeviceMemoryError
from aat_hf.vulkan.shapes import Shape
from aat_hf.vulkan.workspace import pool_of, rates

# Each binding with one kind of memory, and with that the workgroup shapes of software drivers and of GPUs.
PROVIDERS = pytest.mark.parametrize(
    ("binding", "provider"), [("kompute", "unified"), ("vulkan", "copies")], indirect=True
)
pytestmark = [pytest.mark.vulkan, PROVIDERS]


@pytest.fixture(autouse=True)
def on_provider(provider, monkeypatch):
    """The kernel computes on the provider under test."""
    monkeypatch.setattr(kernel, "get_provider", lambda: provider)


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    mask = masks(2, 4, 70, 70)[name]
    check(inputs(2, 4, 2, 70, 70, 32), random_map(mask, 2, 4, 32, 16, 0.6), mask)


@pytest.mark.parametrize("dims", [(3, 3), (40, 24), (64, 64), (80, 80), (256, 256)])
def test_head_dims(dims):
    mask = causal_mask(40, 40, CPU)
    check(inputs(1, 2, 1, 40, 40, *dims), random_map(mask, 1, 2, 32, 32), mask)


@pytest.mark.parametrize("tiles", [(16, 48), (33, 17), (1024, 1024)])
@pytest.mark.parametrize(("queries", "keys"), [(37, 83), (60, 40), (1, 40)])
def test_ragged_lengths_and_tiles(tiles, queries, keys):
    mask = causal_mask(queries, keys, CPU)
    check(inputs(1, 4, 2, queries, keys, 32), random_map(mask, 1, 4, *tiles, 0.6), mask)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(MASKS),
    queries=st.integers(1, 70),
    keys=st.integers(1, 70),
    query_tile=st.sampled_from([16, 24, 64]),
    key_tile=st.sampled_from([8, 12, 16]),
    density=st.sampled_from([0.3, 0.7, 1.0]),
)
def test_joined_tiles(name, queries, keys, query_tile, key_tile, density):
    mask = masks(2, 4, queries, keys)[name]
    check(inputs(2, 4, 2, queries, keys, 16), random_map(mask, 2, 4, query_tile, key_tile, density), mask)


def test_the_device_takes_joined_tiles_in_both_directions(monkeypatch):
    taken, by_rows = [], lowering.by_rows

    def spy(tiles, query_tile):
        taken.append(len(tiles.columns))
        return by_rows(tiles, query_tile)

    monkeypatch.setattr(lowering, "by_rows", spy)
    mask = full_mask(32, 64, CPU)
    run(inputs(1, 2, 1, 32, 64, 16), TileMap.dense(mask, 1, 2, 32, 16), mask, 0.25)
    assert taken == [4, 4]  # of 2 heads x 4 tiles


@pytest.mark.parametrize("softcap", [0.5, 50.0])
@pytest.mark.parametrize("name", ["causal", "per head"])
def test_softcap(softcap, name):
    mask = masks(1, 2, 50, 50)[name]
    check(inputs(1, 2, 2, 50, 50, 32), random_map(mask, 1, 2, 16, 32, 0.7), mask, 0.5, softcap)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves(dtype):
    mask = causal_mask(50, 50, CPU)
    check(inputs(1, 2, 1, 50, 50, 32, dtype=dtype), random_map(mask, 1, 2, 32, 32), mask)


def test_scores_of_any_size():
    mask = full_mask(40, 40, CPU)
    q, k, v = (x.detach() for x in inputs(1, 2, 2, 40, 40, 32))
    tile_map = random_map(mask, 1, 2, 32, 32)
    output, lse = vulkan_attention(200 * q, k, v, tile_map, mask, 1.0)
    expected, expected_lse = oracle(200 * q.double(), k.double(), v.double(), tile_map, mask, 1.0)
    assert distance(lse, expected_lse) < 1e-6
    assert distance(output, expected) < 1e-3  # a score of 3000 has an error of 2e-4


@pytest.mark.parametrize("shape", [Shape(8, 1, 3), Shape(32, 2, 8)], ids=str)
def test_any_workgroup_shape(shape, monkeypatch):
    monkeypatch.setattr(profile, "shape", lambda *_, **__: shape)
    mask = causal_mask(50, 50, CPU)
    check(inputs(1, 2, 1, 50, 50, 40, 24), random_map(mask, 1, 2, 32, 32), mask)


def test_without_subgroup_shuffles(monkeypatch):
    mask = masks(1, 2, 50, 50)["window"]
    tensors, tile_map = inputs(1, 2, 1, 50, 50, 32), random_map(mask, 1, 2, 32, 32)
    shuffled = run(tensors, tile_map, mask, 0.3)
    monkeypatch.setattr(workgroups, "subgroups", lambda device: False)
    assert all(torch.equal(a, b) for a, b in zip(run(tensors, tile_map, mask, 0.3), shuffled, strict=True))


def test_one_submission_without_copies_of_results(provider, monkeypatch):
    """Only what a shader reads is uploaded: a result among it would need a submission of its own with kompute."""
    calls, start = [], provider.start
    monkeypatch.setattr(provider, "start", lambda *a, **k: calls.append((a[0], k["upload"])) or start(*a, **k))
    mask, tensors = causal_mask(50, 50, CPU), inputs(1, 2, 1, 50, 50, 32)
    run(tensors, random_map(mask, 1, 2, 32, 32), mask, 0.3)
    assert len(calls) == 2  # forward and backward
    for dispatches, upload in calls:
        assert set().union(*map(limits.written_buffers, dispatches)).isdisjoint(map(id, upload))


@pytest.mark.parametrize(("together", "first"), [(0, 1), (3 * 4 * 40 * 32, 2), (1 << 20, 3)])
def test_long_inputs_are_sent_while_others_are_written(together, first, provider, monkeypatch):
    sent, send = [], provider.send
    monkeypatch.setattr(workspace, "_LONG", 4 * 40 * 32)
    monkeypatch.setattr(workspace, "_TOGETHER", together)
    monkeypatch.setattr(provider, "send", lambda *buffers: sent.append([x.used for x in buffers]) or send(*buffers))
    mask, tensors = causal_mask(40, 40, CPU), inputs(1, 2, 1, 40, 40, 32)
    for _ in range(3):
        check(tensors, random_map(mask, 1, 2, 32, 32), mask)
    assert len(sent[0]) == first  # of q, twice as long as k and v
    assert sum(map(len, sent)) >= 3 * (3 + 4) and min(map(min, sent)) == 4 * 40 * 32


@pytest.mark.parametrize("epsilon", [0.3, 1e-3])
def test_skip_rule(epsilon):
    """Nothing is lost beyond the bound, and the gradients are those of what was computed."""
    mask = causal_mask(90, 90, CPU)
    q, k, v = (0.5 * x.detach() for x in inputs(1, 2, 1, 90, 90, 32))
    q[..., 0], k[..., 0] = 1.0, 0.0
    k[:, :, 32:64, 0] = (math.log(epsilon) - 3) / 0.3  # the second tile lies below the others for every row
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    tile_map = TileMap.dense(mask, 1, 2, 32, 32)
    found = vulkan_skip_attention(q, k, v, tile_map, mask, 0.3, None, math.log(epsilon))
    _, exact = oracle(q.double(), k.double(), v.double(), tile_map, mask, 0.3)
    lost = 1 - torch.exp(found.lse.detach().double() - exact.detach())
    assert found.skipped.any() and float(lost.max()) > epsilon / 100
    assert (lost <= found.lost.double() + 1e-5).all()
    assert (found.lost < 1).all()
    kept = kept_pairs(found.skipped, tile_map, 90)
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    allowed = kept & mask.rows(torch.arange(90))
    expected, expected_lse, _ = reference_attention(*doubles, allowed, 0.3)
    assert distance(found.output.detach(), expected.detach()) < 2e-6
    mine = gradients(found.output, found.lse, (q, k, v))
    for one, other in zip(mine, gradients(expected, expected_lse, doubles), strict=True):
        assert distance(one, other) < 4e-6


def kept_pairs(skipped, tile_map, length):
    """Pairs that were computed: bool (1, heads, length, length)."""
    blocks = tile_map.query_tile // (skipped.shape[1] // (tile_map.key_tile // workgroups.OTHER))
    pieces = skipped.view(len(skipped), -1, tile_map.key_tile // workgroups.OTHER)
    pairs = ~pieces.repeat_interleave(blocks, 1).repeat_interleave(workgroups.OTHER, 2)
    full = torch.zeros(*tile_map.shape, tile_map.query_tile, tile_map.key_tile, dtype=torch.bool)
    full.view(-1, tile_map.shape[3], tile_map.query_tile, tile_map.key_tile)[tile_map.rows, tile_map.columns] = pairs
    return full.transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, :length, :length]


def test_no_room_on_the_device(monkeypatch, caplog):
    """The CPU kernel takes over, forward and backward, and one warning says so."""
    monkeypatch.setattr(kernel, "_told", set())
    mask = causal_mask(40, 40, CPU)
    tensors, tile_map = inputs(1, 2, 1, 40, 40, 32), random_map(mask, 1, 2, 32, 32)
    expected = cpu_attention(*tensors, tile_map, mask, 0.2)
    from_device = vulkan_attention(*tensors, tile_map, mask, 0.2)

    def full(pool, *sizes):
        raise OutOfDeviceMemoryError(f"no room for {sum(sizes)} bytes")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "aat_hf"):
        patch.setattr(BufferPool, "acquire", full)
        found = vulkan_attention(*tensors, tile_map, mask, 0.2)
        late = gradients(*from_device, tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for mine, theirs in zip(late, gradients(*expected, tensors), strict=True):
        assert distance(mine, theirs.double()) < 2e-6
    assert caplog.text.count("no room") == 1 and "the CPU kernel computes" in caplog.text


def test_tensors_of_another_device_or_dtype_are_refused():
    mask = causal_mask(32, 32, CPU)
    tile_map = random_map(mask, 1, 2, 32, 32)
    with pytest.raises(ValueError, match=r"\.cpu\(\)"):
        vulkan_attention(*(x.to("meta") for x in inputs(1, 2, 1, 32, 32, 8)), tile_map, mask, 1.0)
    with pytest.raises(TypeError, match="gather"):
        vulkan_attention(*inputs(1, 2, 1, 32, 32, 8, dtype=torch.float64), tile_map, mask, 1.0)


@pytest.mark.parametrize("mode", ["tiled", "skip"])
def test_as_a_backend(mode, small):
    q, k, v = peaked(1, 4, 2, 150, 150, 32)
    results = [
        tiled_attention(q, k, v, config=small.replace(backend=backend, mode=mode, tolerance=0.3), is_causal=True)
        for backend in ("vulkan", "gather")
    ]
    assert results[0].path == mode and float(results[0].tile_map.density.mean()) < 1
    tolerance = 2e-6 if mode == "tiled" else 0.5  # the skip rules differ in what they leave out together
    assert distance(results[0].output, results[1].output.double()) < tolerance


def test_buffers_are_used_again(provider):
    """Calls of one shape take the same memory, whatever their maps."""
    mask, pool = causal_mask(70, 70, CPU), pool_of(provider)
    q, k, v = (x.detach() for x in inputs(1, 2, 1, 70, 70, 32))
    vulkan_attention(q, k, v, random_map(mask, 1, 2, 32, 32), mask, 0.2)
    hits, misses, held = pool.statistics.hits, pool.statistics.misses, pool.statistics.held
    for _ in range(3):
        vulkan_attention(q, k, v, random_map(mask, 1, 2, 32, 32, 0.5), mask, 0.2)
    assert (pool.statistics.misses, pool.statistics.held) == (misses, held)
    assert pool.statistics.hits > hits and pool.statistics.in_use == 0


def tiny_model(backend):
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, vocab_size=64)
    config = LlamaConfig(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, **sizes)
    model = LlamaForCausalLM._from_config(config, attn_implementation="aat")
    settings = dict(query_tile=32, key_tile=32, min_length=0, dense_prefix=0, max_kept=1.0, local_keys=0)
    aat_hf.configure(model, backend=backend, tolerance=0.3, sample_stride=8, **settings)
    return model


def test_a_model_generates_the_same_text():
    tokens = torch.randint(64, (1, 120))
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    texts = []
    for backend in ("vulkan", "cpu"):
        model = tiny_model(backend).eval()
        with aat_hf.record(model) as report:
            texts.append(model.generate(tokens, attention_mask=torch.ones_like(tokens), **options))
        assert "tiled" in str(report)
    assert torch.equal(*texts)


def test_a_training_step_has_the_same_gradients():
    tokens = torch.randint(64, (1, 120))
    grads = []
    for backend in ("vulkan", "cpu"):
        model = tiny_model(backend).train()
        model(input_ids=tokens, labels=tokens).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for mine, theirs in zip(*grads, strict=True):
        assert distance(mine, theirs.double()) < 1e-5


class Gradients(TrainerCallback):
    """Keeps the gradients of a step."""

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        self.found = [parameter.grad.clone() for parameter in model.parameters()]


def test_a_trainer_step_has_the_same_gradients(tmp_path):
    pytest.importorskip("accelerate")
    data = [dict(input_ids=row, labels=row) for row in torch.randint(64, (2, 120))]
    silent = dict(use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False)
    arguments = TrainingArguments(str(tmp_path), max_steps=1, per_device_train_batch_size=2, **silent)
    kept = []
    for backend in ("vulkan", "cpu"):
        kept.append(Gradients())
        Trainer(tiny_model(backend), arguments, train_dataset=data, callbacks=kept[-1:]).train()
    for mine, theirs in zip(kept[0].found, kept[1].found, strict=True):
        assert distance(mine, theirs.double()) < 1e-5


def test_rates_of_the_device_in_use(provider):
    pool_of(provider)
    found = rates()
    assert 0 <= found["pool_hit_rate"] <= 1 and 0 <= found["pipeline_hit_rate"] <= 1
    assert found["pool_high_water_mib"] >= 0 and 0 <= found["pool_external_fragmentation"] < 1
