from __future__ import annotations

import math

import pytest
import torch

from aat_hf.geometry.flow import FlowSingularityError
from aat_hf.geometry.surfaces import flat_torus, ricci_flow, round_sphere

SURFACES = {"sphere": (round_sphere(24), 2), "torus": (flat_torus(10), 0)}


def bumps(surface, batch=2):
    """Smooth fields of low degree."""
    x = surface.points if surface.curvature == 0 else torch.acos(surface.points)
    return 0.2 * torch.stack([((i + 1) * x.cos()).sum(-1) + (x[:, 0].cos()) ** 2 for i in range(batch)])


@pytest.mark.parametrize("name", SURFACES)
def test_total_curvature_is_topology(name):
    surface, euler = SURFACES[name]
    u = bumps(surface)
    total = surface.integral(surface.gauss_curvature(u), u)
    assert torch.allclose(total, torch.full_like(total, 2 * math.pi * euler), atol=1e-10)


@pytest.mark.parametrize("name", SURFACES)
def test_the_laplacian_has_its_eigenfunctions(name):
    surface, _ = SURFACES[name]
    x = surface.points[:, 0]
    field, value = ((3 * x**2 - 1) / 2, -6.0) if name == "sphere" else ((2 * x).sin(), -4.0)
    assert torch.allclose(surface.laplacian @ field, value * field, atol=1e-10)
    assert (surface.weights @ surface.laplacian).abs().max() < 1e-10


@pytest.mark.parametrize("radius", [1.0, 1.5])
def test_a_round_sphere_shrinks_by_the_radius_law(radius):
    surface, _ = SURFACES["sphere"]
    u = torch.full((24,), math.log(radius), dtype=torch.float64)
    time = 0.4 * radius**2
    found = torch.exp(2 * ricci_flow(surface, u, time))
    assert torch.allclose(found, torch.full_like(found, radius**2 - 2 * time), rtol=1e-9)


@pytest.mark.parametrize("name", SURFACES)
def test_the_area_falls_at_the_rate_of_topology(name):
    surface, euler = SURFACES[name]
    u = bumps(surface)
    found = surface.area(ricci_flow(surface, u, 0.1))
    assert torch.allclose(found, surface.area(u) - 4 * math.pi * euler * 0.1, rtol=1e-12)


@pytest.mark.parametrize("name", SURFACES)
def test_the_normalised_flow_keeps_the_area_and_evens_out_the_curvature(name):
    surface, euler = SURFACES[name]
    u = bumps(surface)
    end = ricci_flow(surface, u, 2.0, normalised=True)
    assert torch.allclose(surface.area(end), surface.area(u), rtol=1e-12)
    goal = 2 * math.pi * euler / surface.area(u)[:, None]
    before, after = ((surface.gauss_curvature(w) - goal).abs().amax() for w in (u, end))
    assert after < 0.2 * before


def test_extinction_is_an_error_that_names_the_time():
    surface, _ = SURFACES["sphere"]
    u = bumps(surface, 1)
    end = float(surface.area(u)) / (8 * math.pi)
    with pytest.raises(FlowSingularityError, match="shrinks to a point") as caught:
        ricci_flow(surface, u, 1.01 * end)
    assert caught.value.time == pytest.approx(end)
    assert ricci_flow(surface, u, 0.9 * end).isfinite().all()


@pytest.mark.parametrize("u", [torch.zeros(3), torch.full((24,), math.nan)])
def test_bad_fields_are_errors(u):
    with pytest.raises(ValueError, match="must be finite"):
        ricci_flow(SURFACES["sphere"][0], u, 0.1)
