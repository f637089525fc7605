from __future__ import annotations

from release_tests import ReleaseTestsUnavailableError, release_tests
from swapped_source import markers


def pytest_pycollect_makemodule(module_path, parent):
    """Make upstream's markers known before a test module here loads upstream's."""
    try:
        names = markers(release_tests())
    except ReleaseTestsUnavailableError:  # the test module says so
        return
    for name in sorted(names):
        parent.config.addinivalue_line("markers", f"{name}: a marker of Transformers' own tests")
