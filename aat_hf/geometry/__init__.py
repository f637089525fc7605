"""Geometry of attention: hyperbolic space, the probability simplex under the Fisher metric, general metrics."""

from aat_hf.geometry.hyperbolic import Lorentz, PoincareBall, to_ball, to_lorentz
from aat_hf.geometry.riemann import RicciTensor

__all__ = ["Lorentz", "PoincareBall", "RicciTensor", "to_ball", "to_lorentz"]
