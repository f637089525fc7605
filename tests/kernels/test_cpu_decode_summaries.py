"""A single query that reads some tiles only: the kernel against float64, its predictions, and what it loses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aat_hf import AATConfig, tiled_attention
from aat_hf.kernels import cpu_decode_loops as loops
from aat_hf.kernels.cpu_decode import decode_attention
from aat_hf.kernels.cpu_decode_inputs import as_step
from aat_hf.kernels.cpu_decode_predict import predicted_masses
from aat_hf.kernels.reference import reference_attention
from aat_hf.tiling import margins
from aat_hf.tiling.masks import IntervalMask
from aat_hf.tiling.moments import log_mass, summarise
from aat_hf.tiling.summaries import TileSummaries

CONFIG = AATConfig(tolerance=0.1, sink_keys=16, local_keys=16, decode_from=0, dense_prefix=0, max_kept=1.0)
LIMIT = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
ROW = torch.zeros(1, dtype=torch.long)
FEW = settings(max_examples=20)  # several steps each
DRAWN = dict(
    batch=st.integers(1, 2), kv_heads=st.integers(1, 2), group=st.integers(1, 4), keys=st.integers(1, 700),
    dim=st.sampled_from([1, 5, 16, 64, 80]),
)  # fmt: skip


def cache(batch, kv_heads, keys, dim, value_dim=None, dtype=torch.float32):
    """Keys of topics that last for 40 tokens, so that tiles differ."""
    topics = torch.randn(batch, kv_heads, -(-keys // 40), dim).repeat_interleave(40, 2)[:, :, :keys]
    k = topics + 0.5 * torch.randn(batch, kv_heads, keys, dim)
    return k.to(dtype), torch.randn(batch, kv_heads, keys, value_dim or dim).to(dtype)


def query(batch, heads, dim, gain=3.0, dtype=torch.float32):
    return (gain * torch.randn(batch, heads, 1, dim)).to(dtype)


def visible(keys, first=0, last=None, key_valid=None, batch=1):
    edges = torch.full((batch, 1), first), torch.full((batch, 1), keys if last is None else last)
    return IntervalMask(*edges, keys, key_valid)


def check(found, q, k, v, mask, summaries, config=CONFIG, scale=0.3, softcap=None, sinks=None):
    """Output and log-sum-exp are those of the kept tiles; a measured loss is exact, any other the one expected."""
    wide = [x.double() for x in (q, k, v)]
    seen = mask.rows(ROW)
    kept = seen & found.tile_map.exact.repeat_interleave(config.key_tile, -1)[..., : k.shape[2]]
    wanted, lse, _ = reference_attention(*wide, kept, scale, softcap, sinks)
    _, exact, _ = reference_attention(*wide, seen, scale, softcap, sinks)
    alive = exact > -math.inf
    assert found.output.dtype == v.dtype and not found.output.isnan().any()
    assert (found.output - wanted).norm() <= LIMIT[q.dtype] * wanted.norm() + 1e-30
    lost = (1 - torch.exp(lse - exact.nan_to_num(neginf=0.0)))[alive]
    if found.measured:
        assert torch.allclose(found.lost[alive], lost, atol=2e-6)
    else:
        assert np.array_equal(found.lost[alive], summaries.margins.expected.reshape(alive.shape)[alive.numpy()])
    assert found.lost[~alive].isnan().all()
    if sinks is None:
        assert torch.allclose(found.lse.double(), lse, atol=1e-5)
    return lost


@FEW
@given(**DRAWN, gain=st.sampled_from([0.1, 1.0, 4.0]), key_tile=st.sampled_from([16, 48]),
       tolerance=st.sampled_from([0.02, 0.3]))  # fmt: skip
def test_steps_of_every_shape(batch, kv_heads, group, keys, dim, gain, key_tile, tolerance):
    config = CONFIG.replace(key_tile=key_tile, summary_keys=key_tile, tolerance=tolerance)
    k, v = cache(batch, kv_heads, keys, dim, 1 + dim // 2)
    summaries, measured = TileSummaries(), []
    for seen in range(max(1, keys - 5), keys + 1):
        call = query(batch, kv_heads * group, dim, gain), k[:, :, :seen], v[:, :, :seen], visible(seen)
        found = decode_attention(*call, config, 0.3, None, None, summaries)
        check(found, *call, summaries, config)
        measured.append(found.measured)
    assert measured == [True] * min(4, keys) + [False] * (len(measured) - 4)


@pytest.mark.parametrize("dtype", LIMIT)
def test_dtypes(dtype):
    k, v = cache(2, 2, 1500, 64, dtype=dtype)
    summaries = TileSummaries()
    for _ in range(6):
        q = query(2, 6, 64, dtype=dtype)
        found = decode_attention(q, k, v, visible(1500), CONFIG, 0.3, None, None, summaries)
        check(found, q, k, v, visible(1500), summaries)
        assert found.tile_map.density.max() < 1


@FEW
@given(st.integers(0, 900), st.integers(0, 900), st.booleans(), st.booleans(), st.booleans())
def test_windows_padding_caps_and_sinks(first, last, padded, capped, sunk):
    valid = torch.arange(900) >= torch.tensor([[0], [500]]) if padded else None
    if padded:
        valid[:, 200:230] = False  # documents that do not belong to the query's
    mask = visible(900, first, last, valid, batch=2)
    k, v = cache(2, 2, 900, 16)
    unseen = ~mask.rows(ROW)[:, 0, 0, :].expand(2, 900)
    broken = k.clone()
    broken.transpose(1, 2)[unseen] = math.nan  # what a query may not see is never read into a result
    extras = 5.0 if capped else None, torch.randn(4) if sunk else None
    summaries = TileSummaries(), TileSummaries()
    for _ in range(6):
        q = query(2, 4, 16)
        found = decode_attention(q, k, v, mask, CONFIG, 0.3, *extras, summaries[0])
        check(found, q, k, v, mask, summaries[0], CONFIG, 0.3, *extras)
        again = decode_attention(q, broken, v, mask, CONFIG, 0.3, *extras, summaries[1])
        assert torch.equal(again.output, found.output) and again.measured == found.measured


@given(**DRAWN, softcap=st.sampled_from([None, 4.0]), padded=st.booleans())
def test_predictions_are_those_of_the_moments(batch, kv_heads, group, keys, dim, softcap, padded):
    """Tiles near the ends, cut or incomplete are exact, those outside the mask have no mass."""
    config, scale = CONFIG.replace(tolerance=0.2), 0.3
    valid = torch.arange(keys).expand(batch, keys) >= torch.arange(batch)[:, None] * (keys // 3) if padded else None
    mask, (k, _) = visible(keys, 0, keys, valid, batch), cache(batch, kv_heads, keys, dim)
    q = query(batch, kv_heads * group, dim)
    step = as_step(q, k, mask, config.key_tile, scale, softcap)
    mass, top, kinds = predicted_masses(step, k, config, TileSummaries())
    with np.errstate(divide="ignore"):
        found = np.log(mass).reshape(*top.shape, -1) + top[..., None] * math.log(2)
    found = found.reshape(batch, kv_heads, group, -1)[..., : kinds.shape[1]]
    rows = q.double().unflatten(1, (kv_heads, group))[:, :, :, 0]
    moments = log_mass(rows, summarise(k.double(), config.key_tile, 1), scale, softcap).numpy()
    scores = scale * rows @ k.double().mT
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask.rows(ROW).expand(batch, 1, 1, keys), -math.inf)
    scores = torch.nn.functional.pad(scores, (0, -keys % config.key_tile), value=-math.inf)
    exact = scores.unflatten(-1, (-1, config.key_tile)).logsumexp(-1).numpy()
    kinds = np.broadcast_to(kinds[:, None, None], found.shape)
    for kind, wanted in ((loops.SUMMARISED, moments), (loops.SCORED, exact)):
        here = (kinds == kind) & (wanted - wanted.max(-1, keepdims=True) > -80)  # the others underflow
        np.testing.assert_allclose(found[here], wanted[here], atol=2e-4)
    assert (found[kinds == loops.UNSEEN] == -math.inf).all() and (exact[kinds == loops.UNSEEN] == -math.inf).all()
    sizes = (exact > -math.inf) & (np.diff(np.append(np.arange(0, keys, 16), keys)) == 16)
    assert not ((kinds == loops.SUMMARISED) & ~sizes).any()
    assert (kinds == loops.SUMMARISED).any() or keys < 200


def steps_of(queries, k, v, first, scale):
    """The loss of each step by float64 (0 where it became exact), and the density; the cache grows from `first`."""
    summaries, lost, density = TileSummaries(), [], []
    for number, q in enumerate(queries):
        seen = min(first + number, k.shape[2])
        call = q, k[:, :, :seen], v[:, :, :seen], visible(seen)
        found = decode_attention(*call, CONFIG, scale, None, None, summaries)
        lost.append(0.0 if found is None else float(check(found, *call, summaries, scale=scale).mean()))
        density.append(1.0 if found is None else float(found.tile_map.density.mean()))
    return np.array(lost), np.array(density)


def test_the_mean_loss_meets_the_tolerance():
    """Over the steps of a growing cache, measured or not; and tiles are left out."""
    k, v = cache(1, 2, 1500, 32)
    lost, density = steps_of([query(1, 4, 32, 1.5) for _ in range(300)], k, v, 1200, 0.3)
    assert 0.2 * CONFIG.tolerance < lost.mean() <= 1.1 * CONFIG.tolerance
    assert density.mean() < 0.8


def test_margins_make_up_for_bad_predictions(monkeypatch):
    """Single keys that outweigh their tile, of which its mean says little."""
    k, v = cache(1, 1, 1500, 32)
    needles = torch.randint(100, 1400, (60,))
    k[:, :, needles] = 8 * torch.nn.functional.normalize(torch.randn(60, 32), dim=-1)
    queries = [5 * k[:, :, needles[step % 60], None] for step in range(400)]
    monkeypatch.setattr(margins, "_START", -1.0)
    lost, density = steps_of(queries, k, v, 1500, 0.1)
    assert lost.mean() <= 1.5 * CONFIG.tolerance and density.mean() < 0.9
    monkeypatch.setattr(margins, "RATE", 0.0)
    assert steps_of(queries, k, v, 1500, 0.1)[0].mean() > 3 * CONFIG.tolerance


def test_a_measured_step_does_what_the_others_do():
    k, v = cache(2, 2, 1200, 16)
    results = []
    for steps in (0, 4):  # the first steps are measured, the fifth is not
        summaries = TileSummaries()
        torch.manual_seed(1)
        q = query(2, 4, 16)
        summaries.margins.next_step(2, 4)
        summaries.margins.steps = steps
        results.append(decode_attention(q, k, v, visible(1200), CONFIG, 0.3, None, None, summaries))
    assert [found.measured for found in results] == [True, False]
    opened = (results[1].tile_map.exact & ~results[0].tile_map.exact).sum()
    assert opened <= 0.02 * results[0].tile_map.exact.sum()  # the tolerance left for values is of all mass, or of less
    torch.testing.assert_close(results[0].output, results[1].output, atol=0.05, rtol=0.05)


def test_a_step_that_would_read_nearly_all_is_exact_and_counted_only_when_measured():
    k, v = cache(1, 1, 1200, 16)
    summaries, config, moved = TileSummaries(), CONFIG.replace(max_kept=0.5), []
    for _ in range(20):
        before = summaries.margins.log.copy()
        assert decode_attention(query(1, 2, 16, 0.01), k, v, visible(1200), config, 0.3, None, None, summaries) is None
        moved.append(not before.size or bool((summaries.margins.log < before).all()))
    assert [step + 1 for step, once in enumerate(moved) if once] == [1, 2, 3, 4, 17]


def test_a_measured_step_that_kept_nothing_becomes_exact():
    """Scores so far apart that the mass of what was read is 0 in float32."""
    k, v = 0.01 * torch.randn(1, 1, 1200, 16), torch.randn(1, 1, 1200, 16)
    k[:, :, 600] = 1.0  # variance freezes: the prediction of its tile is too small for a key this far from the mean
    summaries = TileSummaries()
    summaries.of(k, 16)
    summaries._means[:, :, 37], summaries._variances[:, :, 37] = -1.0, 0.0  # a prediction as wrong as can be
    q = torch.full((1, 1, 1, 16), 40.0)
    assert decode_attention(q, k, v, visible(1200), CONFIG, 1.0, None, None, summaries) is None
    assert summaries.margins.log[0] > 3  # and the margin has learnt


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("steps", [0, 4])
def test_keys_that_are_not_finite_go_to_exact_attention(value, steps):
    k, v = cache(1, 1, 1300, 32)
    k[0, 0, 900, 3] = value
    summaries = TileSummaries()
    summaries.margins.next_step(1, 2)
    summaries.margins.steps = steps
    q = query(1, 2, 32)
    assert decode_attention(q, k, v, visible(1300), CONFIG, 0.3, None, None, summaries) is None


def test_huge_scores_do_not_overflow():
    k, v = cache(1, 2, 1000, 64)
    summaries = TileSummaries()
    for _ in range(8):
        q = query(1, 4, 64, 1e4)
        found = decode_attention(q, k, v, visible(1000), CONFIG, 0.3, None, None, summaries)
        if found is not None:
            check(found, q, k, v, visible(1000), summaries)


def test_threads_do_not_change_a_bit():
    k, v = cache(1, 3, 20000, 64)
    q, before, found = query(1, 9, 64), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            summaries = TileSummaries()
            steps = [decode_attention(q, k, v, visible(20000), CONFIG, 0.3, None, None, summaries) for _ in range(6)]
            found.append([(step.output, step.lse, step.lost) for step in steps])
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*found, strict=True):
        assert all(map(torch.equal, a, b))


def test_the_result_says_what_was_measured():
    k, v = cache(1, 2, 1500, 32)
    summaries = TileSummaries()
    summaries.note(k)
    results = [tiled_attention(query(1, 4, 32), k, v, config=CONFIG) for _ in range(20)]
    assert {found.path for found in results} == {"tiled"} and {found.reason for found in results} == {None}
    assert [found.audit is not None for found in results] == [step < 4 or step == 16 for step in range(20)]
    for found in results[:4]:
        assert torch.equal(found.audit.infidelity[..., 0], found.estimated)
    assert tiled_attention(query(1, 4, 32), k, v, config=CONFIG.replace(mode="skip")).path == "skip"
    assert tiled_attention(query(1, 4, 32), k[:], v, config=CONFIG).path == "skip"  # a tensor nobody knows
    assert summaries.margins.steps == 20
