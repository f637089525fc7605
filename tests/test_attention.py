from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import peaked

from aat_hf import AATConfig, register_selector, tiled_attention
from aat_hf.kernels.cpu import cpu_attention
from aat_hf.kernels.reference import reference_attention
from aat_hf.tiling.masks import FunctionMask, IntervalMask, TensorMask, causal_mask
from aat_hf.tiling.selectors import SELECTORS
from aat_hf.tiling.tile_map import TileMap

SHAPES = [(1, 2, 2, 300, 300, 32), (2, 4, 2, 257, 257, 33), (1, 4, 1, 123, 519, 64), (1, 2, 1, 200, 90, 7)]


def oracle(q, k, v, allowed, **kwargs):
    scale = kwargs.pop("scale", q.shape[-1] ** -0.5)
    extras = {name: value if not torch.is_tensor(value) else value.double() for name, value in kwargs.items()}
    return reference_attention(q.double(), k.double(), v.double(), allowed, scale, **extras)


def causal(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype,close", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_tolerance_zero_is_exact(shape, is_causal, dtype, close):
    batch, heads, kv_heads, queries, keys, dim = shape
    sizes = (heads, queries), (kv_heads, keys), (kv_heads, keys)
    q, k, v = (torch.randn(batch, h, n, dim, dtype=dtype) for h, n in sizes)
    out = tiled_attention(q, k, v, config=AATConfig(tolerance=0.0, min_length=0), is_causal=is_causal)
    allowed = causal(shape[3], shape[4]) if is_causal else torch.ones(1, 1, shape[3], shape[4], dtype=torch.bool)
    expected, lse, _ = oracle(q, k, v, allowed)
    assert out.output.dtype == dtype and (out.output - expected).norm() / expected.norm() < close
    finite = lse.isfinite()
    assert torch.equal(finite, out.lse.isfinite())
    assert torch.allclose(out.lse[finite].double(), lse[finite], atol=10 * close)
    assert out.path == "dense" and "tolerance is 0" in out.reason


def test_gradients_with_tolerance_zero_are_those_of_sdpa():
    leaves = [torch.randn(2, h, 50, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    weights = torch.randn(2, 4, 50, 8, dtype=torch.float64)
    found = tiled_attention(*leaves, config=AATConfig(tolerance=0.0, min_length=0), is_causal=True).output
    expected = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    pairs = zip(*(torch.autograd.grad((x * weights).sum(), leaves) for x in (found, expected)), strict=True)
    assert all((x - y).norm() / y.norm() < 1e-11 for x, y in pairs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("extra", ["none", "softcap", "sinks", "coarse"])
def test_gather_backend_equals_reference_backend(shape, is_causal, extra, small):
    q, k, v = peaked(*shape, dtype=torch.float64)
    kwargs = {"softcap": {"softcap": 5.0}, "sinks": {"sinks": torch.randn(shape[1])}}.get(extra, {})
    config = small.replace(coarse=extra == "coarse")
    a = tiled_attention(q, k, v, config=config, is_causal=is_causal, **kwargs)
    b = tiled_attention(q, k, v, config=config.replace(backend="reference"), is_causal=is_causal, **kwargs)
    assert a.path == b.path
    assert torch.allclose(a.output, b.output, atol=1e-12, rtol=0)
    assert torch.allclose(a.lse, b.lse, atol=1e-12, rtol=0)
    if a.tile_map is not None:
        assert torch.equal(a.tile_map.to_dense(), b.tile_map.to_dense())


@pytest.mark.parametrize("extra", ["none", "softcap", "sinks", "coarse"])
def test_cpu_backend_equals_reference_backend(extra, small):
    tensors = [x.requires_grad_() for x in peaked(2, 4, 2, 257, 257, 33)]
    sinks = torch.randn(4, requires_grad=True)
    kwargs = {"softcap": {"softcap": 5.0}, "sinks": {"sinks": sinks}}.get(extra, {})
    found = {}
    for backend in ("cpu", "reference"):
        config = small.replace(coarse=extra == "coarse", backend=backend)
        result = tiled_attention(*tensors, config=config, is_causal=True, **kwargs)
        leaves = [*tensors, *([sinks] if extra == "sinks" else [])]
        found[backend] = (result, torch.autograd.grad(result.output.sin().sum() + result.lse.sum(), leaves))
    (a, grad_a), (b, grad_b) = found["cpu"], found["reference"]
    assert a.path == b.path == "tiled" and torch.equal(a.tile_map.to_dense(), b.tile_map.to_dense())
    assert torch.allclose(a.output, b.output, atol=2e-5) and torch.allclose(a.lse, b.lse, atol=2e-5)
    for x, y in zip(grad_a, grad_b, strict=True):
        assert (x - y).norm() < 1e-4 * y.norm()


@pytest.mark.parametrize("selector", sorted(SELECTORS))
def test_every_selector_keeps_what_it_promises(selector, small):
    q, k, v = peaked(2, 4, 2, 1024, 1024, 32)
    result = tiled_attention(q, k, v, config=small.replace(selector=selector, tolerance=0.05), is_causal=True)
    assert result.path == "tiled"
    assert result.tile_map.density.mean() < 0.95
    assert result.audit.mean.mean() <= 0.05 * 1.2  # the control rows repair what a weak estimate loses
    _, lse, _ = oracle(q, k, v, causal(1024, 1024))
    true_loss = -torch.expm1(result.lse.double() - lse).mean(-1)
    inside = (result.audit.mean - true_loss).abs() <= result.audit.half_width + 1e-6
    assert inside.float().mean() >= 0.75


def test_infidelity_is_the_total_variation_distance(small):
    q, k, v = peaked(1, 2, 2, 512, 512, 16, dtype=torch.float64)
    result = tiled_attention(q, k, v, config=small, is_causal=True)
    _, lse, weights = oracle(q, k, v, causal(512, 512))
    kept = result.tile_map.exact.repeat_interleave(32, 2).repeat_interleave(32, 3)
    sparse = (weights * kept) / (weights * kept).sum(-1, keepdim=True)
    total_variation = (weights - sparse).abs().sum(-1) / 2
    assert torch.allclose(-torch.expm1(result.lse - lse), total_variation, atol=1e-12)
    assert torch.allclose(result.output, sparse @ v, atol=1e-12)


@pytest.mark.parametrize("extra", ["none", "softcap", "sinks", "coarse"])
def test_gradients_equal_those_of_the_reference(extra, small):
    q, k, v = (x.requires_grad_() for x in peaked(1, 4, 2, 200, 200, 16, dtype=torch.float64))
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    kwargs = {"softcap": {"softcap": 5.0}, "sinks": {"sinks": sinks}}.get(extra, {})
    grads = []
    for backend in ("gather", "reference"):
        config = small.replace(backend=backend, coarse=extra == "coarse")
        result = tiled_attention(q, k, v, config=config, is_causal=True, **kwargs)
        assert result.path == "tiled"
        weight = torch.linspace(-1, 1, result.output.numel(), dtype=torch.float64).view_as(result.output)
        loss = (result.output * weight).sum() + result.lse.sin().sum()
        inputs = [q, k, v] + ([sinks] if extra == "sinks" else [])
        grads.append(torch.autograd.grad(loss, inputs))
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_rows_without_keys_are_zero_with_finite_gradients(small):
    q, k, v = (x.requires_grad_() for x in peaked(2, 2, 2, 256, 256, 16))
    valid = torch.ones(2, 256, dtype=torch.bool)
    valid[1, :70] = False
    mask = causal_mask(256, 256, q.device, key_valid=valid)
    for config in (small, small.replace(tolerance=0.0), small.replace(mode="skip")):
        result = tiled_attention(q, k, v, config=config, attn_mask=mask)
        assert result.output[1, :, :70].abs().max() == 0
        assert torch.isneginf(result.lse[1, :, :70]).all()
        for grad in torch.autograd.grad(result.output.square().sum(), (q, k, v)):
            assert grad.isfinite().all()


def test_padded_batch_equals_each_alone(small):
    q, k, v = peaked(2, 2, 2, 320, 320, 16)
    valid = torch.ones(2, 320, dtype=torch.bool)
    valid[1, 200:] = False
    config = small.replace(tolerance=0.0)
    both = tiled_attention(q, k, v, config=config, attn_mask=causal_mask(320, 320, q.device, key_valid=valid))
    alone = tiled_attention(q[1:, :, :200], k[1:, :, :200], v[1:, :, :200], config=config, is_causal=True)
    assert torch.allclose(both.output[1:, :, :200], alone.output, atol=1e-6)


@pytest.mark.parametrize("backend", ["gather", "cpu"])
def test_skip_mode_certificate_holds(small, backend):
    q, k, v = peaked(1, 2, 1, 700, 700, 32, dtype=torch.float64 if backend == "gather" else torch.float32)
    skip = small.replace(mode="skip", tolerance=0.02, backend=backend)
    result = tiled_attention(q * 4, k, v, config=skip, is_causal=True)
    _, lse, _ = oracle(q * 4, k, v, causal(700, 700))
    loss = -torch.expm1(result.lse.double() - lse).mean(-1)
    assert result.path == "skip" and result.tile_map.density.max() < 1
    assert (loss <= result.estimated + 1e-6).all()
    none = tiled_attention(q, k, v, config=skip.replace(tolerance=1e-300), is_causal=True)
    assert (none.tile_map.density == 1).all()


def test_the_cpu_backend_names_what_it_cannot_take(small):
    q, k, v = peaked(1, 2, 1, 300, 300, 16, dtype=torch.float64)
    with pytest.raises(TypeError, match="gather"):
        tiled_attention(q, k, v, config=small.replace(backend="cpu"), is_causal=True)
    mask = causal_mask(300, 300, q.device)
    tile_map = TileMap.dense(mask, 1, 2, 32, 32)
    with pytest.raises(ValueError, match="meta"):
        cpu_attention(*(x.float().to("meta") for x in (q, k, v)), tile_map, mask, 0.25)


def test_results_are_bit_equal_between_runs(small):
    q, k, v = peaked(1, 4, 2, 700, 700, 32)
    a, b = (tiled_attention(q, k, v, config=small, is_causal=True) for _ in range(2))
    assert torch.equal(a.output, b.output) and torch.equal(a.audit.infidelity, b.audit.infidelity)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype, small):
    q, k, v = peaked(1, 4, 2, 300, 300, 33, dtype=dtype)
    result = tiled_attention(q, k, v, config=small, is_causal=True)
    wide = tiled_attention(q.float(), k.float(), v.float(), config=small, is_causal=True)
    assert result.output.dtype == dtype
    assert (result.output.float() - wide.output).abs().max() <= torch.finfo(dtype).eps * 8


def test_a_users_own_selector(small):
    register_selector(
        "first_half", lambda scene: torch.ones_like(scene.states, dtype=torch.float32).expand(1, 2, -1, -1)
    )
    try:
        q, k, v = peaked(1, 2, 2, 300, 300, 16)
        result = tiled_attention(q, k, v, config=small.replace(selector="first_half", control_rows=0))
        assert result.path == "tiled"
    finally:
        SELECTORS.pop("first_half")


def test_values_that_are_not_finite_are_reported_and_seen(small):
    q, k, v = peaked(1, 2, 2, 300, 300, 16)
    k[0, 0, 17, 3] = float("nan")
    result = tiled_attention(q, k, v, config=small, is_causal=True)
    assert result.path == "dense" and "not finite" in result.reason
    assert result.output[0, 0, 20:].isnan().all() and result.output[0, 1].isfinite().all()


BAD = [
    (lambda q, k, v: (q.int(), k, v), TypeError, "q has dtype torch.int32"),
    (lambda q, k, v: (q, k.double(), v), TypeError, "must be equal"),
    (lambda q, k, v: (q[0], k, v), ValueError, "q has shape"),
    (lambda q, k, v: (q[:, :, :0], k, v), ValueError, "no dimension may be 0"),
    (lambda q, k, v: (q[:, :3], k, v), ValueError, "multiple of kv_heads"),
    (lambda q, k, v: (q, k[..., :5], v), ValueError, "same head_dim"),
    (lambda q, k, v: (q, k, v[:, :, :5]), ValueError, "keys of k and v"),
    (lambda q, k, v: (q, k, v.to("meta")), ValueError, "one device"),
    (lambda q, k, v: (q, k, None), TypeError, "v is NoneType"),
]


@pytest.mark.parametrize(("spoil", "error", "message"), BAD)
def test_bad_inputs_are_named(spoil, error, message):
    with pytest.raises(error, match=message):
        tiled_attention(*spoil(*peaked(1, 4, 2, 20, 20, 8)))


def test_bad_masks_are_named():
    q, k, v = peaked(1, 2, 2, 20, 20, 8)
    with pytest.raises(ValueError, match="must broadcast"):
        tiled_attention(q, k, v, attn_mask=torch.ones(3, 7, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"torch\.int64"):
        tiled_attention(q, k, v, attn_mask=torch.ones(20, 20, dtype=torch.long))
    for batch, heads in ((3, 1), (1, 5)):
        mask = TensorMask(torch.ones(batch, heads, 20, 20, dtype=torch.bool))
        with pytest.raises(ValueError, match="1 stands for all"):
            tiled_attention(q, k, v, attn_mask=mask)
    with pytest.raises(ValueError, match="selector"):
        tiled_attention(
            *peaked(1, 2, 2, 300, 300, 8), config=AATConfig(selector="no such", min_length=0, dense_prefix=0)
        )


@st.composite
def cases(draw):
    heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    shape = (draw(st.integers(1, 2)), heads * group, heads, draw(st.integers(1, 70)), draw(st.integers(1, 70)))
    return (
        shape,
        draw(st.integers(1, 9)),
        draw(st.sampled_from(["none", "causal", "tensor", "additive", "interval", "function"])),
        draw(st.sampled_from([16, 32])),
        draw(st.sampled_from([0.0, 0.05, 0.5])),
        draw(st.sampled_from(["mix", "moments", "box", "pooled", "antidiagonal"])),
        draw(st.sampled_from(["gather", "cpu"])),
        draw(st.integers(0, 2**31)),
    )


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
@pytest.mark.slow
def test_random_shapes_and_masks_are_right_for_their_tile_map(case):
    """The output is exact attention over the tiles the map keeps; at tolerance 0 over all that is allowed."""
    (batch, heads, kv_heads, queries, keys), dim, kind, tile, tolerance, selector, backend, seed = case
    torch.manual_seed(seed)
    dtype, close = {"gather": (torch.float64, 1e-9), "cpu": (torch.float32, 1e-4)}[backend]
    q, k, v = (torch.randn(batch, h, n, dim, dtype=dtype) * 3 for h, n in
               ((heads, queries), (kv_heads, keys), (kv_heads, keys)))  # fmt: skip
    allowed = torch.rand(batch, 1, queries, keys) < torch.rand(())
    kwargs = {"none": {}, "causal": {"is_causal": True}, "tensor": {"attn_mask": allowed}}.get(kind)
    if kind == "none":
        allowed = torch.ones_like(allowed)
    elif kind == "causal":
        allowed = causal(queries, keys).expand_as(allowed)
    elif kind == "additive":
        kwargs = {"attn_mask": torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)}
    elif kind == "interval":
        edges = torch.randint(0, keys + 1, (2, batch, queries)).sort(0).values
        valid = torch.rand(batch, keys) < 0.8
        kwargs = {"attn_mask": IntervalMask(edges[0], edges[1], keys, valid)}
        j = torch.arange(keys)
        allowed = ((j >= edges[0][..., None]) & (j < edges[1][..., None]) & valid[:, None])[:, None]
    elif kind == "function":
        table = allowed
        mask = FunctionMask(lambda b, h, i, j: table[b, 0 * h, i, j], batch, queries, keys, q.device)
        kwargs = {"attn_mask": mask}
    config = AATConfig(tolerance=tolerance, query_tile=tile, key_tile=tile, min_length=0, dense_prefix=0,
                       sink_keys=tile, local_keys=tile,
                       selector=selector, predict_stride=4, control_rows=4, backend=backend)  # fmt: skip
    result = tiled_attention(q, k, v, config=config, **kwargs)
    if result.tile_map is not None:
        kept = result.tile_map.exact.repeat_interleave(tile, 2).repeat_interleave(tile, 3)
        allowed = allowed & kept[:, :, :queries, :keys]
    expected, lse, _ = oracle(q, k, v, allowed)
    assert torch.allclose(result.output.double(), expected, atol=close)
    assert torch.allclose(result.lse.double().nan_to_num(neginf=-1e9), lse.nan_to_num(neginf=-1e9), atol=close)
