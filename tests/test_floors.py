"""Imports go down only. The floors are those of README "Design"; the higher a floor, the more it may know."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    0: (
        "d3rt",
        "d3rt.config",
        "d3rt.plan",
        "d3rt.row_plans",
        "d3rt.policies",
        "d3rt.sampling",
        "d3rt.errors",
        "d3rt.gpus",
        "d3rt.roofline",
    ),
    1: ("d3rt.kernels", "d3rt._C", "d3rt.kv_cache", "d3rt.quantize"),
    2: ("d3rt.backends",),
    3: (
        "d3rt.models",
        "d3rt.generation",
        "d3rt.result",
        "d3rt.memory",
        "d3rt.detokenizer",
        "d3rt.nodes",
        "d3rt.ladder",
        "d3rt.prefill",
        "d3rt.programs",
        "d3rt.storage",
        "d3rt.cached_sequence",
    ),
    4: ("d3rt.compiling", "d3rt.engine", "d3rt.runtime", "d3rt.session", "d3rt.row_batch"),
    5: (
        "d3rt.cli",
        "d3rt.__main__",
        "d3rt.demo",
        "d3rt.bench",
        "d3rt.evaluation",
        "d3rt.reporting",
        "d3rt.planning",
        "d3rt.plots",
        "d3rt.progress",
        "d3rt.search",
        "d3rt.tuning",
        "d3rt.lm_eval",
    ),
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
FILES = {
    **{
        path: ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted(ROOT.glob("d3rt/**/*.py"))
    },
    **{
        path: "d3rt." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted(ROOT.glob("kernels/**/*.py"))
    },
}


def floor_of(module: str) -> int:
    """The floor of a module, or of the nearest package above it that has one; KeyError for a stranger."""
    return (
        FLOOR_OF[module]
        if module in FLOOR_OF or "." not in module[5:]
        else floor_of(module.rpartition(".")[0])
    )


def imports(path: Path) -> Iterator[str]:
    """Every imported module, in functions too; not those that only type checkers see."""
    unseen = [ast.parse(path.read_text(encoding="utf-8"))]
    while unseen:
        node = unseen.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            unseen += node.orelse
            continue
        unseen += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            for (
                alias
            ) in node.names:  # `from d3rt import bench` imports a module, `from d3rt import D3` does not
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in FLOOR_OF or whole in FILES.values() else node.module


def module_of(path: Path) -> str:
    return FILES[path].removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    module = module_of(path)
    for name in imports(path):
        top = name.partition(".")[0]
        if top == "d3rt" and name != "d3rt":
            assert floor_of(name) <= floor_of(module), f"{module} imports {name}, which is on a higher floor"
        if top == "d3rt" and name == "d3rt":
            assert floor_of(module) == 5, f"{module} imports the public package, which is made of it"
        if floor_of(module) == 0 and top != "d3rt":
            assert top in sys.stdlib_module_names, (
                f"{module} is of the standard library only, but imports {name}"
            )
        if name == "d3rt._C":
            assert module == "d3rt.backends.native", f"{module}: only d3rt.backends.native may import it"
        if top == "triton":
            assert module.startswith("d3rt.kernels.cuda"), f"{module} imports triton"
        if name.startswith("d3rt.kernels.cuda") and not module.startswith("d3rt.kernels.cuda"):
            assert module.startswith("d3rt.backends.cuda"), f"{module} imports {name}, which may need Triton"
        if top == "flash_attn":
            assert module == "d3rt.backends.cuda_prefill", f"{module} imports flash_attn"


def test_the_test_sees_every_file_and_every_floor_exists():
    assert len(FILES) > 25
    modules = {module_of(path) for path in FILES} | {"d3rt._C"}
    assert set(FLOOR_OF) <= modules
