"""The automatic gates on the sources: sizes, annotations, docstrings, and things that may not occur at all."""

import ast
import io
import re
import statistics
import tokenize
from collections.abc import Iterator

import pytest

from tests.architecture.sources import Function, Module, modules

MAX_MODULE_LINES = 300
MEDIAN_MODULE_LINES = 150
MAX_FUNCTION_LINES = 80
MAX_KERNEL_LINES = 120
P90_FUNCTION_LINES = 40
MIN_DOCSTRING_SHARE = 0.9
BROAD = {"Exception", "BaseException"}
TODO = re.compile(r"\b(?:TODO|FIXME|XXX|HACK)\b(?!\((?:#\d+|[\w.-]+ ?[<>=]+ ?[\w.]+)\))")


def function_lines(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def is_kernel(function: Function) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def unannotated(function: Function) -> list[str]:
    """Return the parameters without annotation; `return` where the result has none."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    named += [extra for extra in (arguments.vararg, arguments.kwarg) if extra]
    missing = [
        argument.arg for argument in named if argument.annotation is None and argument.arg not in ("self", "cls")
    ]
    return missing + (["return"] if function.returns is None else [])


def forbidden(module: Module) -> Iterator[str]:
    """Yield each thing that may not stand in a source, with its line."""
    for node in ast.walk(module.tree):
        match node:
            case ast.ExceptHandler(type=None):
                yield f"{node.lineno}: bare except"
            case ast.ExceptHandler(type=kind) if BROAD & {
                name.id for name in ast.walk(kind) if isinstance(name, ast.Name)
            }:
                yield f"{node.lineno}: broad except"
            case ast.Global():
                yield f"{node.lineno}: global"
            case ast.Call(func=ast.Name(id="print")) if module.path != "glm4moe_cli/_output.py":
                yield f"{node.lineno}: print outside _output.py"
    for number, line in enumerate(module.text.splitlines(), 1):
        if not line.isascii():
            yield f"{number}: not ASCII"
    for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
        if token.type == tokenize.COMMENT and TODO.search(token.string):
            yield f"{token.start[0]}: TODO without an issue or version"


def test_the_tree_is_found() -> None:
    paths = {module.path for module in modules()}
    assert {"converters/schema.py", "glm4moe_cli/main.py", "runtime/__init__.py"} <= paths


def test_modules_are_short() -> None:
    assert {m.path: m.code_lines for m in modules() if m.code_lines > MAX_MODULE_LINES} == {}
    assert statistics.median(m.code_lines for m in modules()) <= MEDIAN_MODULE_LINES


def test_functions_are_short() -> None:
    lines = []
    too_long = []
    for module in modules():
        for name, function, _ in module.functions():
            lines.append(function_lines(function))
            limit = MAX_KERNEL_LINES if is_kernel(function) else MAX_FUNCTION_LINES
            if lines[-1] > limit:
                too_long.append(f"{module.path} {name}: {lines[-1]} lines")
    assert too_long == []
    assert statistics.quantiles(lines, n=10)[-1] <= P90_FUNCTION_LINES


def test_public_functions_are_annotated() -> None:
    found = {
        f"{module.path} {name}": unannotated(function)
        for module in modules()
        for name, function, public in module.functions()
        if public and not is_kernel(function) and unannotated(function)
    }
    assert found == {}


def test_public_functions_have_docstrings() -> None:
    public = [
        (f"{module.path} {name}", ast.get_docstring(function))
        for module in modules()
        for name, function, is_public in module.functions()
        if is_public
    ]
    bare = [name for name, docstring in public if not docstring]
    assert len(bare) <= (1 - MIN_DOCSTRING_SHARE) * len(public), bare


def test_nothing_forbidden_occurs() -> None:
    assert [f"{module.path}:{line}" for module in modules() for line in forbidden(module)] == []


@pytest.mark.parametrize(
    "code",
    [
        "try:\n    f()\nexcept:\n    pass",
        "try:\n    f()\nexcept (ValueError, Exception):\n    pass",
        "def f():\n    global count",
        "print('x')",
        "unit = '\u00b5s'",
        "x = 1  # TODO make this faster",
    ],
)
def test_a_forbidden_thing_is_seen(code: str) -> None:
    assert list(forbidden(Module("converters/a.py", code))) != []


@pytest.mark.parametrize("code", ["x = 1  # TODO(#12) drop", "x = 1  # TODO(torch >= 2.14) drop", "output.print(1)"])
def test_an_allowed_thing_passes(code: str) -> None:
    assert list(forbidden(Module("converters/a.py", code))) == []


def test_unannotated_names_what_lacks_a_type() -> None:
    function = ast.parse("def f(self, a, /, b: int, *c, d, **e): ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    assert sorted(unannotated(function)) == ["a", "c", "d", "e", "return"]


def test_private_and_nested_functions_are_not_public() -> None:
    code = "class A:\n    def m(self):\n        def n(): ...\n    def _p(self): ...\nclass _B:\n    def q(self): ...\n"
    assert [(name, public) for name, _, public in Module("a.py", code).functions()] == [
        ("A.m", True), ("A.m.n", False), ("A._p", False), ("_B.q", False),
    ]  # fmt: skip
