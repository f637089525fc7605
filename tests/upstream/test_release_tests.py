"""Transformers' own tests of every model (`ModelTesterMixin`) for GPT-2, BERT and Llama, with aat for sdpa.

They are fetched in exactly the installed version. Every family runs twice: with tolerance 0, where aat is exact by
design, and with tiles forced on short inputs and a tolerance so small that equality tests still have to pass.
"""

from __future__ import annotations

import unittest

import pytest
from release_tests import ReleaseTestsUnavailableError, offline, release_tests
from swapped_attention import EXACT, REACHING, TILED, Common, select, swapped  # noqa: F401  (swapped is a fixture)
from swapped_source import load
from tiny_testers import BertTester, GPT2Tester, LlamaTester

pytestmark = [
    # upstream's tests provoke warnings on purpose and by age; only those that come from our own code count
    # (and one test wants to see a warning)
    pytest.mark.filterwarnings("ignore", "always:.past_key_values. is deprecated:FutureWarning", "error:::aat_hf"),
]

try:
    folder = release_tests()
except ReleaseTestsUnavailableError as error:
    unavailable = str(error)
    if offline():
        pytest.skip(unavailable, allow_module_level=True)

    def test_the_release_tests_can_be_had():
        pytest.fail(unavailable)

else:
    common = load(folder)

    @pytest.mark.usefixtures("swapped")
    class _Case(Common, common.ModelTesterMixin):
        pass

    @select
    class TestGPT2(_Case, unittest.TestCase):
        make_tester = GPT2Tester
        settings = EXACT

    @select
    class TestGPT2Tiled(_Case, unittest.TestCase):
        make_tester = GPT2Tester
        settings = TILED

    @select
    class TestBert(_Case, unittest.TestCase):
        make_tester = BertTester
        settings = EXACT

    @select
    class TestBertTiled(_Case, unittest.TestCase):
        make_tester = BertTester
        settings = TILED

    @select
    class TestLlama(_Case, unittest.TestCase):
        make_tester = LlamaTester
        settings = EXACT

    @select
    class TestLlamaTiled(_Case, unittest.TestCase):
        make_tester = LlamaTester
        settings = TILED

    @pytest.mark.parametrize("case", [TestGPT2, TestGPT2Tiled, TestBert, TestBertTiled, TestLlama, TestLlamaTiled])
    def test_enough_tests_reach_attention(case: type):
        """A release that renames its tests must not empty these classes unseen."""
        assert sum(bool(REACHING.fullmatch(name)) and callable(getattr(case, name)) for name in dir(case)) >= 30
