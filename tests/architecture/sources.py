"""The source tree as the architecture tests see it: text and syntax tree of every module of the three packages."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("converters", "runtime", "glm4moe_cli")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """A module by its path inside the repository."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def code_lines(self) -> int:
        return sum(1 for line in self.text.splitlines() if line.strip())

    def functions(self) -> Iterator[tuple[str, Function, bool]]:
        """Yield every function with its qualified name and whether it can be reached without an underscore."""
        yield from _functions(self.tree, "", public=True)


def _functions(node: ast.AST, prefix: str, *, public: bool) -> Iterator[tuple[str, Function, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef):
            name = f"{prefix}{child.name}"
            visible = public and not child.name.startswith("_")
            if isinstance(child, Function):
                yield name, child, visible
            # what is defined inside a function is its own business
            yield from _functions(child, f"{name}.", public=visible and isinstance(child, ast.ClassDef))
        else:
            yield from _functions(child, prefix, public=public)


@cache
def modules() -> tuple[Module, ...]:
    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return tuple(Module(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths)


def docstring_nodes(tree: ast.Module) -> set[ast.Constant]:
    """Return the constants that are docstrings."""
    owners = (node for node in ast.walk(tree) if isinstance(node, Function | ast.ClassDef | ast.Module))
    firsts = (owner.body[0] for owner in owners if owner.body)
    return {first.value for first in firsts if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)}
