from __future__ import annotations

import pytest
import torch
from inputs import peaked

from aat_hf import tiled_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]


@pytest.fixture(autouse=True)
def float32_products():
    """Products in float32 where the machine's setting is TF32, which has three digits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("coarse", [False, True])
def test_cuda_equals_the_float64_reference(dtype, coarse, small):
    q, k, v = (x.cuda() for x in peaked(2, 4, 2, 1027, 1027, 65, dtype=dtype))
    config = small.replace(coarse=coarse)
    result = tiled_attention(q, k, v, config=config, is_causal=True)
    wide = [x.double() for x in (q, k, v)]
    exact = tiled_attention(*wide, config=config.replace(backend="reference"), is_causal=True)
    same = (result.tile_map.to_dense() == exact.tile_map.to_dense()).all(-1).repeat_interleave(32, 2)[:, :, :1027]
    error = (result.output.double() - exact.output)[same].norm() / exact.output[same].norm()
    limit = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert result.path == "tiled" and result.output.dtype == dtype
    assert same.float().mean() > 0.9 and error < limit


def test_cuda_gradients_equal_the_reference_backend(small):
    grads = []
    for backend in ("gather", "reference"):
        torch.manual_seed(0)
        q, k, v = (x.cuda().requires_grad_() for x in peaked(1, 4, 2, 300, 300, 16, dtype=torch.float64))
        result = tiled_attention(q, k, v, config=small.replace(backend=backend), is_causal=True)
        grads.append(torch.autograd.grad(result.output.sin().sum() + result.lse.sum(), (q, k, v)))
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_cuda_model_equals_eager():
    import transformers as tf

    import aat_hf

    config = tf.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config).cuda().eval()
    aat_hf.configure(model, tolerance=0.0)
    ids, mask = torch.randint(3, 97, (2, 40), device="cuda"), torch.ones(2, 40, dtype=torch.long, device="cuda")
    mask[1, :9] = 0
    logits = {}
    for name in ("eager", "aat"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            logits[name] = model(ids, attention_mask=mask).logits[mask.bool()]
    assert torch.allclose(logits["eager"], logits["aat"], atol=1e-4)
