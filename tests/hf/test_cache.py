"""Layers of `AATCache` beside those of `DynamicCache`: the same tokens whatever is done, and no stale summaries."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import transformers as tf
from transformers.cache_utils import DynamicLayer

import aat_hf
from aat_hf.hf.cache import AATLayer
from aat_hf.tiling.moments import summarise
from aat_hf.tiling.summaries import summaries_of

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = 3, 2, 0, 5  # batch, heads, tokens, dim


def states(tokens, batch=3):
    return torch.randn(batch, 2, tokens, 5), torch.randn(batch, 2, tokens, 5)


def filled(tokens=70):
    """The same tokens in a layer of each kind."""
    added = states(tokens)
    layers = AATLayer(), DynamicLayer()
    for layer in layers:
        layer.update(*added)
    return layers


def append(layers, tokens=1):
    added = states(tokens, len(layers[1].keys) if layers[1].is_initialized else 3)
    for layer in layers:
        layer.update(*added)


def check_summaries(layer, key_tile=16):
    """The summaries of the keys are those of the keys."""
    found = summaries_of(layer.keys)
    assert found is not None
    means, variances, count = found.of(layer.keys, key_tile)
    wanted = summarise(layer.keys[:, :, : count * key_tile], key_tile, 1)
    assert count == layer.keys.shape[2] // key_tile
    np.testing.assert_allclose(means[:, :, :count], wanted.mean[:, :, :, 0], atol=1e-6)
    np.testing.assert_allclose(variances[:, :, :count], wanted.variance[:, :, :, 0], atol=1e-6)


def equal(layers):
    ours, wanted = layers
    assert ours.get_seq_length() == wanted.get_seq_length()
    return torch.equal(ours.keys, wanted.keys) and torch.equal(ours.values, wanted.values)


OPERATIONS = {
    "crop": lambda layer: layer.crop(-23),
    "crop nothing": lambda layer: layer.crop(0),
    "crop all": lambda layer: layer.crop(-70),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([2, 0])),
    "select by mask": lambda layer: layer.batch_select_indices(torch.tensor([True, False, True])),
    "reset": lambda layer: layer.reset(),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("summarised", [True, False])
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_operations(name, summarised, mode):
    with mode():
        layers = filled()
        append(layers, 3)
        layers[0].crop(-3), layers[1].crop(-3)
        known = summaries_of(layers[0].keys)
        known.margins.next_step(3, 2)
        known.margins.log[:] = torch.arange(6).numpy()
        if summarised:
            check_summaries(layers[0])
        for layer in layers:
            OPERATIONS[name](layer)
        if name == "reset":
            assert layers[0].keys is None and layers[0].get_seq_length() == 0
            layers = layers[0], DynamicLayer()  # before Transformers 5.24 theirs kept tokens of zeros
        else:
            assert equal(layers) and summaries_of(layers[0].keys) is known
            wanted = {"reorder": [4, 5, 0, 1, 0, 1], "repeat": [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5],
                      "select": [4, 5, 0, 1], "select by mask": [0, 1, 4, 5]}.get(name, [0, 1, 2, 3, 4, 5])  # fmt: skip
            assert known.margins.log.tolist() == wanted
        for _ in range(40):
            append(layers)
        assert equal(layers)
        check_summaries(layers[0])


@torch.no_grad()
def test_operations_before_a_tile_is_complete():
    layers = filled(7)
    check_summaries(layers[0])
    for layer in layers:
        layer.batch_repeat_interleave(2)
    append(layers, 40)
    check_summaries(layers[0])
    for layer in layers:
        layer.batch_select_indices(torch.tensor([5, 1]))
    append(layers, 40)
    assert equal(layers)
    check_summaries(layers[0])


@torch.no_grad()
def test_an_empty_layer_is_left_alone():
    for operation in OPERATIONS.values():
        layer = AATLayer()
        operation(layer)
        assert layer.get_seq_length() == 0 and layer.keys is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_was_returned_stays_as_it_was(mode):
    with mode():
        layers = filled()
        seen = []
        for step in range(60):
            added = states(1)
            for layer in layers:
                returned = layer.update(*added)
                if isinstance(layer, AATLayer):
                    seen.append((*returned, *(x.clone() for x in returned)))
            if step == 30:
                for layer in layers:
                    layer.crop(-20)
            if step == 45:  # somebody puts an earlier state back
                layers[0].keys, layers[0].values = seen[5][:2]
                layers[1].keys, layers[1].values = seen[5][2:]
        assert equal(layers)
        assert all(torch.equal(k, old_k) and torch.equal(v, old_v) for k, v, old_k, old_v in seen)
        assert [summaries_of(k) for k, *_ in seen[:-1]] == [None] * (len(seen) - 1)
        check_summaries(layers[0])


CHANGES = {
    "in place": lambda layer: layer.keys.mul_(2),
    "a part": lambda layer: layer.keys[:, :, 3].zero_(),
    "detached": lambda layer: layer.keys.detach().add_(1),
    "replaced": lambda layer: setattr(layer, "keys", layer.keys * 2),
    "other memory": lambda layer: setattr(layer.keys, "data", layer.keys.data * 2),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", sorted(CHANGES))
def test_summaries_of_changed_keys_are_not_used(change, mode):
    with mode():
        layers = filled()
        check_summaries(layers[0])
        for layer in layers:
            CHANGES[change](layer)
        assert summaries_of(layers[0].keys) is None
        append(layers)
        assert equal(layers)
        check_summaries(layers[0])


@torch.no_grad()
def test_tensors_made_from_the_keys_have_no_summaries():
    layer = AATLayer()
    keys, _ = layer.update(*states(40))
    assert summaries_of(keys) is not None
    made = keys.clone(), keys[:], keys.detach(), copy.deepcopy(keys), keys.to(torch.float64), keys.view(keys.shape)
    assert [summaries_of(x) for x in made] == [None] * 6


@torch.no_grad()
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_go_their_own_way(how):
    cache, wanted = aat_hf.AATCache(), tf.DynamicCache()
    for added in (states(70), states(1)):
        for each in (cache, wanted):
            each.update(*added, 0)
    copied, apart = how(cache), copy.deepcopy(wanted)
    assert type(copied) is aat_hf.AATCache
    for here, there in ((cache, wanted), (copied, apart), (cache, wanted)):
        added = states(1)
        for each in (here, there):
            each.update(*added, 0)
    for here, there in ((cache, wanted), (copied, apart)):
        assert equal((here.layers[0], there.layers[0]))
        check_summaries(here.layers[0])
    assert len(pickle.dumps(cache)) < 1.2 * len(pickle.dumps(wanted))


@torch.no_grad()
def test_tokens_can_be_saved_and_loaded_as_tensors():
    cache, file = aat_hf.AATCache(), io.BytesIO()
    cache.update(*states(40), 0)
    torch.save([layer[:2] for layer in cache], file)
    file.seek(0)
    ((keys, values),) = torch.load(file, weights_only=True)
    assert torch.equal(keys, cache.layers[0].keys) and torch.equal(values, cache.layers[0].values)
    again = aat_hf.AATCache([(keys, values)])
    assert type(again.layers[0]) is AATLayer and equal((again.layers[0], cache.layers[0]))


@torch.no_grad()
def test_memory_grows_now_and_then():
    layer, places = AATLayer(), set()
    for _ in range(1000):
        layer.update(*states(1))
        places.add(layer.keys.data_ptr())
    assert len(places) <= 16


@torch.no_grad()
@pytest.mark.parametrize("wrong", [
    lambda k, v: (k[:1], v[:1]), lambda k, v: (k, v[:1]), lambda k, v: (k[..., :4], v), lambda k, v: (k[:, :1], v),
])  # fmt: skip
def test_tokens_of_another_shape_are_refused(wrong):
    layers = filled()
    for layer in layers:
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            layer.update(*wrong(*states(1)))


@torch.no_grad()
def test_another_dtype_is_promoted_as_by_dynamic_cache():
    layers = filled()
    added = [x.double() for x in states(1)]
    for layer in layers:
        layer.update(*added)
    assert equal(layers) and layers[0].keys.dtype == torch.float64
    append(layers)
    assert equal(layers)
