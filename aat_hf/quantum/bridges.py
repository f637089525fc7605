"""Bridges to QuTiP and PennyLane, for whoever wants to go on there with the states of real attention heads.

A user of attention gets a head's states and density matrices as QuTiP objects (all of its solvers and plots) or as
PennyLane state preparations (circuits on simulators and devices), and takes results back as tensors.
Both libraries are optional: a call without them says what to install.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def to_qutip(state: Tensor, dims: Sequence[int] | None = None) -> Any:
    """`state` (n,) as a ket, or (n, n) as an operator: a `qutip.Qobj` in complex128.

    Args:
        dims: dimensions of subsystems, multiplying to n; by default one system.

    Raises:
        ImportError: QuTiP is not installed.
        ValueError: a batch, or an operator that is not square.
    """
    qutip = _optional("qutip")
    _check_single(state)
    subsystems = list(dims) if dims is not None else [state.shape[0]]
    shape = [subsystems, [1] * len(subsystems) if state.ndim == 1 else subsystems]
    return qutip.Qobj(_array(state), dims=shape)


def from_qutip(qobj: Any, dtype: torch.dtype = torch.complex128) -> Tensor:
    """A `qutip.Qobj` as a tensor: ket (n,), bra (n,) as the ket it belongs to, operator (n, n).

    Raises:
        ValueError: a superoperator.
    """
    if qobj.isbra:
        qobj = qobj.dag()
    if not (qobj.isket or qobj.isoper):
        raise ValueError(f"only kets, bras and operators can be converted, not a Qobj of type {qobj.type!r}")
    dense = torch.tensor(qobj.full(), dtype=torch.complex128)
    return (dense[:, 0] if qobj.isket else dense).to(dtype)


def to_pennylane(state: Tensor, wires: Sequence[Any] | None = None) -> Any:
    """`state` (n,) as `qml.StatePrep`, or a density matrix (n, n) as `qml.QubitDensityMatrix`.

    Args:
        wires: by default 0, 1, ...; as many as hold n. Missing basis states up to the power of two have amplitude 0.

    Raises:
        ImportError: PennyLane is not installed.
        ValueError: a batch, an operator that is not square, or too few or many wires.
    """
    pennylane = _optional("pennylane")
    _check_single(state)
    qubits = max(1, (state.shape[0] - 1).bit_length())
    wires = list(wires) if wires is not None else list(range(qubits))
    if len(wires) != qubits:
        raise ValueError(f"{state.shape[0]} dimensions need {qubits} wires, not {len(wires)}")
    missing = 2**qubits - state.shape[0]
    array = _array(torch.nn.functional.pad(state, (0, missing) if state.ndim == 1 else (0, missing, 0, missing)))
    return pennylane.StatePrep(array, wires) if state.ndim == 1 else pennylane.QubitDensityMatrix(array, wires)


def from_pennylane(result: Any, size: int | None = None, dtype: torch.dtype = torch.complex128) -> Tensor:
    """The result of `qml.state()` or `qml.density_matrix()`, or an operation of `to_pennylane`, as a tensor.

    Args:
        result: array of any interface (2^q,) or (2^q, 2^q), or the operation that holds it.
        size: leading dimensions to keep, undoing the padding of `to_pennylane`.
    """
    data = result.data[0] if hasattr(result, "wires") else result
    tensor = data.detach() if isinstance(data, Tensor) else torch.tensor(data)
    tensor = tensor.to(dtype)
    return tensor if size is None else tensor[(slice(size),) * tensor.ndim]


def _optional(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this needs {name}, which is optional: pip install {name}") from error


def _check_single(state: Tensor) -> None:
    if state.ndim not in (1, 2) or state.shape[0] != state.shape[-1]:
        raise ValueError(f"one state (n,) or one operator (n, n) can be converted, not {tuple(state.shape)}")


def _array(state: Tensor) -> Any:
    return state.detach().to("cpu", torch.complex128).resolve_conj().numpy()
