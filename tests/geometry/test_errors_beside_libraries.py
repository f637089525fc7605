from __future__ import annotations

import pytest

pytest.importorskip("mpmath")

from aat_hf.bench import geometry
from aat_hf.bench._geometry_errors import cases
from aat_hf.bench._geometry_libraries import libraries

TARGETS = {
    "ball distance": 1e-6,
    "lorentz distance": 1e-6,
    "ball largest d(x, x)": 0.0,
    "lorentz largest d(x, x)": 0.0,
    "ball log(exp(v))": 3e-5,  # float32 points of the ball at radius 4 hold no more
    "lorentz log(exp(v))": 1e-5,
    "ball, log's Jacobian": 1e-7,
    "Fisher-Rao": 1e-5,
    "fidelity": 1e-5,
    "1 - fidelity": 1e-5,
    "largest fidelity less 1": 0.0,
    "entropy": 1e-5,
    "largest entropy of pure states": 2e-6,
}


@pytest.fixture(scope="module")
def found():
    return libraries()


def test_ours_keeps_to_the_targets_and_the_textbook_does_not(found):
    worst_textbook = 0.0
    for case in cases(10):
        target = max((start for start in TARGETS if case.label.startswith(start)), key=len)
        assert case.error(found["aat_hf"].functions) <= TARGETS[target], case.label
        if case.needs in found["textbook"].functions and "1e-3" in case.label:
            worst_textbook = max(worst_textbook, case.error(found["textbook"].functions))
    assert worst_textbook > 1e-2  # the measurements can tell


@pytest.mark.parametrize("library", ["geoopt", "geomstats", "hypll", "qutip"])
def test_libraries_agree_with_us_where_their_formulae_are_accurate(found, library):
    if library not in found:
        pytest.skip(f"{library} is not installed")
    easy = ("distance, radius 1", "radius 1, length 1", "distance, perturbation 1", "of pure states", "of mixed states")
    compared = [case for case in cases(10) if case.label.endswith(easy) and case.needs in found[library].functions]
    assert compared
    for case in compared:
        assert case.error(found[library].functions) <= 1e-4, case.label


def test_the_tables_have_a_line_for_every_measurement(capsys, tmp_path):
    assert geometry.main(["--count", "2", "--out", str(tmp_path / "errors.csv")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("|") for line in lines) == 2 + len(cases(1))
    assert lines[2].startswith("| largest relative error | aat_hf") and lines[2].endswith("| textbook |")
    arguments = ["--times", "--pairs", "30", "--dims", "3", "--size", "8", "--rounds", "1"]
    assert geometry.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "| lorentz dist and gradient | 3 |" in shown and "| mixed fidelity |" in shown
