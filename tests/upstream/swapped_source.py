"""Upstream's `test_modeling_common.py`, loaded with "aat" where it says "sdpa"."""

from __future__ import annotations

import ast
import re
import sys
import types
import warnings
from pathlib import Path
from typing import Any

PACKAGE = "transformers_release_tests"
_STAND_INS = {  # what the module imports and the source distribution lacks
    "exporters.test_export": "ExportTesterMixin",
    "generation.test_utils": "GenerationTesterMixin",
}


class _Swap(ast.NodeTransformer):
    """ "sdpa" becomes "aat", and the comparison with eager wants every sequence of the batch equal, not 80 %.

    Only the last sequence of that batch is padded: 80 % would let an implementation ignore padding.
    """

    swapped = 0
    comparison = False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        before, self.comparison = self.comparison, node.name == "_test_eager_matches_sdpa_inference"
        self.generic_visit(node)
        self.comparison = before
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if node.value == "sdpa":
            self.swapped += 1
            return ast.copy_location(ast.Constant("aat"), node)
        if node.value == 0.8 and self.comparison:
            return ast.copy_location(ast.Constant(1.0), node)
        return node


def markers(folder: Path) -> set[str]:
    """Names of the pytest markers the module uses."""
    source = (folder / "test_modeling_common.py").read_text("utf-8")
    builtin = {"parametrize", "skip", "skipif", "xfail", "usefixtures", "filterwarnings"}
    return set(re.findall(r"\bmark\.(\w+)", source)) - builtin


def load(folder: Path) -> Any:
    """The module, as part of a package of its own: the name `tests` could be anybody's."""
    name = f"{PACKAGE}.test_modeling_common"
    if name in sys.modules:
        return sys.modules[name]
    path = folder / "test_modeling_common.py"
    swap = _Swap()
    tree = swap.visit(ast.parse(path.read_text("utf-8"), str(path)))
    assert swap.swapped, f'{path} does not mention "sdpa" any more: these tests would not reach aat'
    for part, mixin in _STAND_INS.items():
        for parent in (PACKAGE, f"{PACKAGE}.{part.split('.')[0]}"):
            sys.modules.setdefault(parent, types.ModuleType(parent)).__path__ = [str(folder)]
        stand_in = types.ModuleType(f"{PACKAGE}.{part}")
        setattr(stand_in, mixin, type(mixin, (), {}))
        sys.modules[stand_in.__name__] = stand_in
    module = types.ModuleType(name)
    module.__file__, module.__package__ = str(path), PACKAGE
    sys.modules[name] = module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what upstream's module warns of while it is imported is not ours
        exec(compile(tree, str(path), "exec"), module.__dict__)
    return module
