"""Attention rows as quantum states: psi = sqrt(attention row), and the standard calculus of states on top of it.

A user of attention gets the one error measure of this package (`fidelity.infidelity`), the number of distinct maps a
head really has (`entropy.effective_rank`), how much the order of heads matters (`operators.noncommutativity`) and how
tokens reach each other across layers (`path_integral.rollout`), all batched and differentiable.

A state is a tensor (..., n), real or complex; a density matrix or an operator is (..., n, n). Logarithms are natural.
`fidelity` is the squared one, |<a|b>|^2 and ||sqrt(rho) sqrt(sigma)||_1^2; `root_fidelity` is its square root.
"""
