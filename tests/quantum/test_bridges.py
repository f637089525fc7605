from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from random_states import density, state

from aat_hf.quantum import bridges


@pytest.mark.parametrize(("function", "library"), [(bridges.to_qutip, "qutip"), (bridges.to_pennylane, "pennylane")])
def test_a_missing_library_says_what_to_install(monkeypatch, function, library):
    monkeypatch.setitem(sys.modules, library, None)  # what import sees when a package is absent
    with pytest.raises(ImportError, match=f"pip install {library}"):
        function(torch.tensor([1.0, 0.0]))


def test_qutip_round_trip():
    qutip = pytest.importorskip("qutip")
    psi, rho = state((6,), torch.complex128, 0), density((6,), 3, torch.complex128, 1)
    ket, operator = bridges.to_qutip(psi, (2, 3)), bridges.to_qutip(rho, (2, 3))
    assert ket.isket and operator.isoper and ket.dims[0] == [2, 3]
    assert torch.equal(bridges.from_qutip(ket), psi) and torch.equal(bridges.from_qutip(operator), rho)
    assert torch.equal(bridges.from_qutip(ket.dag()), psi)
    assert bridges.from_qutip(ket, torch.complex64).dtype == torch.complex64
    assert ket.ptrace(0).shape == (2, 2)
    assert complex(qutip.expect(operator, ket)) == pytest.approx(complex(psi.conj() @ rho @ psi))
    real = bridges.to_qutip(torch.tensor([0.6, 0.8]).requires_grad_())
    assert real.norm() == pytest.approx(1)
    for bad in (torch.zeros(2, 2, 2), torch.zeros(2, 3), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="one state"):
            bridges.to_qutip(bad)
    with pytest.raises(ValueError, match="super"):
        bridges.from_qutip(qutip.to_super(operator))


def test_pennylane_round_trip():
    qml = pytest.importorskip("pennylane")
    psi, rho = state((5,), torch.complex128, 0), density((3,), 2, torch.complex128, 1)
    prepare, mix = bridges.to_pennylane(psi), bridges.to_pennylane(rho, ["a", "b"])
    assert list(prepare.wires) == [0, 1, 2] and list(mix.wires) == ["a", "b"]

    @qml.qnode(qml.device("default.qubit", wires=3))
    def prepared():
        qml.apply(prepare)
        return qml.state()

    @qml.qnode(qml.device("default.mixed", wires=["a", "b"]))
    def mixed():
        qml.apply(mix)
        return qml.density_matrix(wires=["a", "b"])

    torch.testing.assert_close(bridges.from_pennylane(prepared(), 5), psi)
    torch.testing.assert_close(bridges.from_pennylane(mixed(), 3), rho)
    torch.testing.assert_close(bridges.from_pennylane(prepare, 5), psi)
    torch.testing.assert_close(bridges.from_pennylane(mix, 3), rho)
    with pytest.raises(ValueError, match="5 dimensions need 3 wires, not 2"):
        bridges.to_pennylane(psi, [0, 1])
    with pytest.raises(ValueError, match="one state"):
        bridges.to_pennylane(torch.zeros(2, 2, 2))


def test_results_of_any_interface_become_tensors():
    psi = state((4,), torch.complex64, 0)
    for result in (psi, psi.numpy(), SimpleNamespace(wires=[0, 1], data=[psi.numpy()])):
        tensor = bridges.from_pennylane(result, 3)
        assert tensor.dtype == torch.complex128
        torch.testing.assert_close(tensor.to(psi.dtype), psi[:3])
