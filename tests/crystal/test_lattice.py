from __future__ import annotations

import pytest
import torch
from crystal_inputs import batches, dtypes, few, gaussian, precisions, seeds, within
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaModel
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as rotate_interleaved
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from aat_hf.crystal import gauge, lattice


def llama(**settings):
    return LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=8, vocab_size=8, **settings
    )


def rotated(x, rotary):
    cos, sin = rotary(x, torch.arange(x.shape[-2])[None])
    return apply_rotary_pos_emb(x, x, cos, sin)[0]


@pytest.mark.parametrize("rope", ["default", "yarn", "linear"])
def test_unrotate_takes_off_what_transformers_put_on(rope):
    parameters = {"rope_type": rope, "rope_theta": 1e4, "factor": 2.0} if rope != "default" else None
    rotary = LlamaRotaryEmbedding(llama(rope_parameters=parameters) if parameters else llama())
    frequencies, factor = lattice.rotary_frequencies(rotary)
    assert (factor != 1) == (rope == "yarn")
    x = gaussian(2, 4, 50, 8, dtype=torch.float32)
    pairs = lattice.unrotate(rotated(x, rotary), frequencies, factor=factor)
    torch.testing.assert_close(pairs, torch.complex(x[..., :4], x[..., 4:]), rtol=0, atol=1e-4)


def test_unrotate_interleaved_pairs():
    x = gaussian(1, 2, 20, 8, dtype=torch.float32)
    frequencies = 1e4 ** -(torch.arange(4) / 4)
    turn = (torch.arange(20)[:, None] * frequencies).repeat_interleave(2, -1)[None]
    there = rotate_interleaved(x, x, turn.cos(), turn.sin())[0]
    pairs = lattice.unrotate(there, frequencies, interleaved=True)
    torch.testing.assert_close(torch.view_as_real(pairs).flatten(-2), x, rtol=0, atol=1e-5)


@few
@given(batches, st.integers(1, 4), st.integers(0, 2), dtypes, seeds)
def test_scores_of_constant_queries_and_keys_are_the_toeplitz_symbol(batch, pairs, more, dtype, seed):
    n, width = 9, 2 * pairs
    q, k = (gaussian(*batch, width + more, seed=seed + i, dtype=dtype) for i in range(2))
    frequencies = gaussian(pairs, seed=seed + 2).abs()
    turn = torch.arange(n, dtype=torch.float64)[:, None] * frequencies

    def rotate(x):
        z = torch.complex(x[..., None, :pairs].double(), x[..., None, pairs:width].double())
        z = z * torch.polar(torch.ones_like(turn), turn)
        rest = x[..., None, width:].double().expand(*batch, n, more)
        return torch.cat([z.real, z.imag, rest], -1).to(dtype)

    scores = 0.3 * rotate(q) @ rotate(k).mT
    offsets = torch.arange(-(n - 1), n)
    profile = lattice.slash_profile(rotate(q), rotate(k), frequencies, offsets, scale=0.3)
    constant = 0.3 * (q[..., width:] * k[..., width:]).sum(-1)[..., None]
    assert profile.dtype == dtype
    atol = within(dtype, 1e-4, 1e-12)
    torch.testing.assert_close(gauge.toeplitz(profile + constant, n), scores, rtol=0, atol=atol)
    means = [lattice.rotary_pairs(x, pairs) for x in (q, k)]
    symbol = lattice.toeplitz_symbol(*means, frequencies, offsets)
    torch.testing.assert_close(0.3 * symbol, profile, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", precisions)
def test_the_profile_survives_noise_around_the_means_and_a_wrong_theta_ruins_it(dtype):
    n, frequencies = 512, 1e4 ** -(torch.arange(8).double() / 8)
    mean_q, mean_k = 2 * gaussian(1, 16), 2 * gaussian(1, 16, seed=1)
    turn = torch.arange(n).double()[:, None] * frequencies

    def rotate(x):
        z = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(turn), turn)
        return torch.cat([z.real, z.imag], -1).to(dtype)

    q, k = rotate(mean_q + gaussian(n, 16, seed=2)), rotate(mean_k + gaussian(n, 16, seed=3))
    offsets = torch.arange(n // 2)
    fit = gauge.fit_scores((q @ k.mT), torch.ones(n, n).tril())
    measured = fit.offset[n - 1 : n - 1 + n // 2]
    right, wrong = (lattice.slash_profile(q, k, f, offsets) for f in (frequencies, frequencies * 1.1))
    assert correlation(right, measured) > 0.99
    assert correlation(wrong, measured) < 0.8


def correlation(a, b):
    """After a linear trend, which the gauge does not fix, has been taken out of both."""
    x = torch.arange(len(a)).double()
    basis = torch.linalg.qr(torch.stack([torch.ones_like(x), x], -1)).Q
    a, b = (y.double() - basis @ (basis.mT @ y.double()) for y in (a, b))
    return float((a * b).sum() / (a.norm() * b.norm()))


def test_frequencies_of_a_model():
    model = LlamaModel(llama(rope_parameters={"rope_type": "default", "rope_theta": 5e4}))
    frequencies, factor = lattice.rotary_frequencies(model)
    torch.testing.assert_close(frequencies, 5e4 ** -(torch.arange(4) / 4))
    assert factor == 1
    with pytest.raises(ValueError, match="no rotary module"):
        lattice.rotary_frequencies(torch.nn.Linear(2, 2))
    model.other = LlamaRotaryEmbedding(llama())
    with pytest.raises(ValueError, match="differ"):
        lattice.rotary_frequencies(model)


def test_local_maxima_and_refusals():
    profile = torch.tensor([5.0, 1, 3, 2, 2, 4, 4, 0, 9])
    assert lattice.local_maxima(profile).nonzero()[:, 0].tolist() == [2, 5]
    with pytest.raises(ValueError, match="need 8 dimensions"):
        lattice.rotary_pairs(torch.ones(2, 6), 4)


def test_gradients():
    q, k = gaussian(5, 4).requires_grad_(), gaussian(5, 4, seed=1).requires_grad_()
    frequencies = torch.tensor([1.0, 0.1]).double()
    assert torch.autograd.gradcheck(lambda q, k: lattice.slash_profile(q, k, frequencies, torch.arange(4), 0.5), (q, k))
