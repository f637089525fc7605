"""Plain operations: right on every provider, and routed by what was measured."""

from __future__ import annotations

import pytest
import torch

from aat_hf.vulkan import calibrate, plain, profile
from aat_hf.vulkan.profile import Direction, Profile

LIMIT = 2e-6
FASTER, SLOWER = Direction(1e-9, 0.0, 0.0, 1.0), Direction(1e9, 0.0, 0.0, 1.0)
SHAPES = {
    "elementwise": [(1,), (5, 7), (64, 64), (3, 1000)],
    "softmax": [(1, 1), (3, 5, 7), (2, 300)],
    "matmul": [(1, 1, 1, 1), (2, 5, 123, 7), (1, 64, 64, 64), (1, 130, 31, 257)],
}


def distance(found, expected):
    """Largest error relative to the largest value."""
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def check(provider, operation, *inputs):
    """Against float64, and the same bits a second time."""
    found = plain.on_device(provider, operation, [inputs])[0]
    assert distance(found, plain.OPERATIONS[operation](*(x.double() for x in inputs))) < LIMIT
    assert torch.equal(found, plain.on_device(provider, operation, [inputs])[0])


@pytest.mark.vulkan
@pytest.mark.parametrize("shape", SHAPES["elementwise"])
@pytest.mark.parametrize("operation", ["add", "mul", "relu"])
def test_elementwise(provider, operation, shape):
    check(provider, operation, *torch.randn(plain.arity(operation), *shape))


@pytest.mark.vulkan
@pytest.mark.parametrize("shape", SHAPES["softmax"])
def test_softmax(provider, shape):
    a = 20 * torch.randn(shape)
    a[..., 0] = 80.0
    check(provider, "softmax", a)


@pytest.mark.vulkan
@pytest.mark.parametrize("sizes", SHAPES["matmul"])
def test_matmul(provider, sizes):
    batch, rows, depth, columns = sizes
    a, b = torch.randn(batch, rows, depth), torch.randn(batch, depth, columns)
    check(provider, "matmul", a, b)
    check(provider, "matmul", a[0], b[0])


@pytest.mark.vulkan
def test_long_sums_of_matmul_stay_accurate(provider):
    """A single chain of float32 sums would be off by 2e-6 here."""
    a, b = torch.randn(32, 4096), torch.randn(4096, 32)
    found = plain.on_device(provider, "matmul", [(a, b)])[0]
    assert distance(found, a.double() @ b.double()) < LIMIT / 3


@pytest.mark.vulkan
@pytest.mark.parametrize("operation", plain.OPERATIONS)
def test_many_in_one_submission(provider, monkeypatch, operation):
    """Of different sizes, each with its own result."""
    batch = [tuple(torch.randn(plain.arity(operation), size, size)) for size in (3, 16, 3, 9)]
    submitted = []
    start = provider.start
    monkeypatch.setattr(provider, "start", lambda *a, **k: submitted.append(a) or start(*a, **k))
    monkeypatch.setattr(plain, "get_provider", lambda: provider)
    found = plain.compute_many(operation, batch, backend="vulkan")
    assert len(submitted) == 1
    for mine, inputs in zip(found, batch, strict=True):
        assert mine.shape == inputs[0].shape
        assert distance(mine, plain.OPERATIONS[operation](*(x.double() for x in inputs))) < LIMIT


@pytest.fixture
def routed(monkeypatch):
    """What reached the device, when `add` and `matmul` were measured to be faster there and `mul` slower."""
    operations = {"add": FASTER, "matmul": FASTER, "mul": SLOWER}
    monkeypatch.setattr(profile, "measured", lambda: Profile({}, [], operations))
    monkeypatch.setattr(plain, "get_provider", lambda: None)
    used = []
    monkeypatch.setattr(plain, "on_device", lambda provider, name, batch: used.append(name) or [None] * len(batch))
    return used


def test_auto_goes_where_it_was_measured_to_be_faster(routed):
    a = torch.randn(4, 4)
    plain.compute("add", a, a)
    plain.compute_many("matmul", [(a, a)] * 3)
    assert torch.equal(plain.compute("mul", a, a), a * a)  # slower
    assert torch.equal(plain.compute("relu", a), a.relu())  # never measured
    assert torch.equal(plain.compute("add", a.double(), a.double()), 2 * a.double())
    assert plain.compute("add", *a.to("meta")[None].expand(2, 4, 4)).is_meta  # of another device
    wanted = a.clone().requires_grad_()
    assert plain.compute("add", wanted, a).requires_grad
    assert torch.equal(plain.compute("add", a, a[0]), a + a[0])  # of two shapes
    assert torch.equal(plain.compute("add", a, a, backend="torch"), a + a)
    assert routed == ["add", "matmul"]
    plain.compute("relu", a, backend="vulkan")
    assert routed[2:] == ["relu"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sub", torch.ones(2)), "there are add"),
        (("add", torch.ones(2).double(), torch.ones(2).double()), "float64 on cpu"),
        (("add", torch.ones(2, device="meta"), torch.ones(2, device="meta")), "on meta"),
        (("add", torch.ones(2)), "takes 2 tensors"),
        (("matmul", torch.ones(2, 3), torch.ones(2, 3)), r"\(2, 3\), \(2, 3\)"),
        (("softmax", torch.ones(2, 0)), r"\(2, 0\)"),
        (("relu", torch.ones(2, requires_grad=True)), "no gradients"),
    ],
)
def test_what_the_device_cannot_take_is_told(routed, arguments, message):
    with pytest.raises(ValueError, match=message):
        plain.compute(*arguments, backend="vulkan")
    assert not routed


def test_load_counts_bytes_there_and_back():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert plain.load_of("matmul", [(a, b)] * 2) == (2 * 4 * (15 + 35 + 21), 2 * 105)
    assert plain.load_of("add", [(a, a)]) == (4 * 45, 15) and plain.load_of("softmax", [(a,)]) == (4 * 30, 15)


def test_calibration_tells_break_evens():
    """A device that costs 1 ms a submission and 1 ns an element, beside a CPU of 10 ns an element."""
    direction = Direction(1e-3, 1e-9 / 12, 0.0, 1e-8)
    assert calibrate._told_of_operation("add", direction) == (
        "add: faster than the CPU from 512², 20 in a submission from 128²"
    )
    assert "never, 20 in a submission never" in calibrate._told_of_operation("add", Direction(1.0, 1.0, 1.0, 0.0))


@pytest.mark.vulkan
def test_calibration_measures_operations(provider, monkeypatch):
    monkeypatch.setattr(calibrate, "_SOFTWARE_MATRICES", ((8, 1), (8, 4), (16, 1)))
    monkeypatch.setattr(calibrate, "_MATRICES", ((8, 1), (8, 4), (16, 1)))
    found = calibrate._operation(provider, "add", 1)
    assert found.cpu_product > 0 and found.call + found.byte + found.product > 0
