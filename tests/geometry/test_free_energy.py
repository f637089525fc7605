from __future__ import annotations

import csv
import math

import mpmath
import pytest
import torch

from aat_hf.bench import geometry
from aat_hf.geometry.free_energy import gaussian_log_mass
from aat_hf.tiling.moments import cumulant

PRECISIONS = [(torch.float32, 1e-6), (torch.float64, 1e-11)]


@pytest.mark.parametrize("count", [8, 16, 32, 64])
def test_the_log_mass_is_the_mean_of_samples(count):
    """400000 of them: their mean has a standard error of less than .007 at s = 6."""
    spreads = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0])
    noise = torch.randn(400_000, count)
    sampled = torch.stack([(s * noise).logsumexp(-1).double().mean() for s in spreads])
    for dtype, _ in PRECISIONS:
        found = gaussian_log_mass(spreads.to(dtype), count)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), sampled, rtol=0, atol=0.02)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0, 4.0, 30.0])
def test_one_and_two_keys_against_thirty_digits(spread, dtype, tolerance):
    """ln(e^x + e^y) = (x + y) / 2 + |x - y| / 2 + ln(1 + e^-|x - y|), where x - y has the variance 2 s^2."""
    with mpmath.workdps(30):
        s = mpmath.mpf(spread) * mpmath.sqrt(2)
        ends = [0, *(mpmath.mpf(2) ** i / (1 + s) for i in range(-3, 6)), 12]
        rest = 2 * mpmath.quad(lambda z: mpmath.log1p(mpmath.exp(-s * z)) * mpmath.npdf(z), sorted(ends))
        exact = float(s / mpmath.sqrt(2 * mpmath.pi) + rest)
    at = torch.tensor(spread, dtype=dtype)
    assert float(gaussian_log_mass(at, 2)) == pytest.approx(exact, rel=tolerance)
    assert abs(float(gaussian_log_mass(at, 1))) <= tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("count", [2, 8, 64])
def test_it_rises_convexly_between_its_bounds(count, dtype, tolerance):
    spread = torch.linspace(0, 6, 25, dtype=dtype)
    found = gaussian_log_mass(spread, count).double()
    slack = 8 * tolerance
    assert float(found[0]) == pytest.approx(math.log(count), rel=tolerance)
    assert (found.diff() >= -slack).all() and (found.diff(n=2) >= -slack).all()
    wide = spread.double()
    assert (found <= math.log(count) + wide.square() / 2 + slack).all()
    largest = torch.randn(100_000, count).amax(-1).double().mean()
    assert (found >= wide * (largest - 0.02)).all()
    predicted = math.log(count) + cumulant(wide.square(), torch.tensor(count))
    assert (found <= predicted + slack).all()  # what holds for infinitely many keys is never reached


def test_gradients_and_refusals():
    spread = torch.tensor([[0.4, 2.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: gaussian_log_mass(s, 8), (spread,))
    assert gaussian_log_mass(torch.zeros(0, 3), 8).shape == (0, 3)
    for bad, count in ((torch.tensor([-1.0]), 8), (torch.tensor([math.nan]), 8), (torch.ones(1), 0)):
        with pytest.raises(ValueError, match="a log-mass needs a key and finite spreads"):
            gaussian_log_mass(bad, count)


def test_the_table_has_every_number_of_keys_and_both_branches(capsys, tmp_path):
    out = tmp_path / "log_mass.csv"
    assert geometry.main(["--log-mass", "--out", str(out)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert lines[0] == "| s | n = 8 | n = 16 | n = 32 | n = 64 |"
    assert len(lines) == 2 + len(geometry.LOG_MASS_SPREADS)
    assert lines[2] == "| 0 | 2.079 (+0.000) | 2.773 (+0.000) | 3.466 (+0.000) | 4.159 (+0.000) |"
    with out.open(encoding="utf-8") as file:
        found = {(row["measurement"], row["library"]): float(row["value"]) for row in csv.DictReader(file)}
    over = found["log-mass, n = 64, s = 4", "prediction"] - found["log-mass, n = 64, s = 4", "aat_hf"]
    assert over == pytest.approx(1.56, abs=0.01)  # beyond sqrt(2 ln 64) = 2.88: frozen
