"""Geometry of attention: hyperbolic space, the probability simplex under the Fisher metric, general metrics.

A user of attention gets distances between rows (`fisher`), other scores (`hyperbolic`, `lift`), the blocks and bridges
of a map (`tile_graph`) and the path of a row through the layers (`attention_flow`), batched and differentiable.
"""

from aat_hf.geometry.hyperbolic import Lorentz, PoincareBall, to_ball, to_lorentz
from aat_hf.geometry.riemann import RicciTensor

__all__ = ["Lorentz", "PoincareBall", "RicciTensor", "to_ball", "to_lorentz"]
