"""Who may import whom, and the one importer of each third-party library."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator

import pytest

from tests.architecture.sources import PACKAGES, ROOT, Module, modules

# package -> what it may never import, at any depth of its code
FORBIDDEN = {
    "converters": ("runtime", "glm4moe_cli", "triton", "transformers", "click", "rich"),
    "runtime": ("glm4moe_cli", "click", "rich"),
}
# library -> the file or folder that may import it
IMPORTER = {
    "click": "glm4moe_cli/",
    "rich": "glm4moe_cli/_output.py",
    "huggingface_hub": "converters/download.py",
    "lm_eval": "runtime/harness/",
    "transformers": "runtime/engine/tokenizer.py",
    "triton": "runtime/kernels/",
    "xxhash": "converters/checkpoint/content_digest.py",
    "torch.distributed": "runtime/parallel/",
}
STDLIB_ONLY = ("converters/errors.py", "converters/config.py", "converters/schema.py", "converters/tensors.py")


def imports(module: Module) -> Iterator[str]:
    """Yield dotted names that the module imports, however: statement, import_module, attribute of torch."""
    for node in ast.walk(module.tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=source, names=names):
                yield from (f"{source}.{alias.name}" for alias in names)
            case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
                if ast.unparse(function) in ("import_module", "importlib.import_module", "__import__"):
                    yield name
            case ast.Attribute(value=ast.Name(id="torch"), attr="distributed"):
                yield "torch.distributed"


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def violations(module: Module) -> list[str]:
    found = []
    for name in imports(module):
        found += [
            f"{module.path} imports {name}, forbidden in {package}"
            for package, banned in FORBIDDEN.items()
            if module.path.startswith(f"{package}/") and any(within(name, other) for other in banned)
        ]
        found += [
            f"{module.path} imports {name}; only {owner} may"
            for library, owner in IMPORTER.items()
            if within(name, library) and not module.path.startswith(owner)
        ]
    return found


def third_party(module: Module) -> set[str]:
    roots = {name.split(".")[0] for name in imports(module)}
    return roots - sys.stdlib_module_names - set(PACKAGES)


def test_imports_respect_the_layers() -> None:
    assert [line for module in modules() for line in violations(module)] == []


def test_base_layer_needs_the_standard_library_only() -> None:
    base = [module for module in modules() if module.path in STDLIB_ONLY]
    assert len(base) == len(STDLIB_ONLY)
    assert {module.path: third_party(module) for module in base if third_party(module)} == {}


def test_every_imported_library_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [line for lines in project["optional-dependencies"].values() for line in lines]
    declared = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in (*project["dependencies"], *optional)}
    used = {library for module in modules() for library in third_party(module)}
    assert used - declared == set()


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("converters/a.py", "import runtime.engine"),
        ("converters/a.py", "def f():\n    from glm4moe_cli._output import Output"),
        ("converters/a.py", "if TYPE_CHECKING:\n    import transformers"),
        ("converters/a.py", "from huggingface_hub import snapshot_download"),
        ("runtime/a.py", "import click"),
        ("runtime/a.py", "importlib.import_module('triton.language')"),
        ("runtime/model/a.py", "from torch import distributed"),
        ("runtime/model/a.py", "import torch\ntorch.distributed.init_process_group()"),
        ("runtime/engine/engine.py", "from transformers import AutoTokenizer"),
        ("glm4moe_cli/commands/a.py", "from rich.table import Table"),
    ],
)
def test_a_forbidden_import_is_seen(path: str, code: str) -> None:
    assert violations(Module(path, code)) != []


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("glm4moe_cli/a.py", "import click\nfrom runtime.engine import Engine"),
        ("glm4moe_cli/_output.py", "import rich.table"),
        ("runtime/a.py", "import torch\nfrom converters.schema import parse\nimport richer"),
        ("runtime/parallel/mesh.py", "import torch.distributed as dist"),
    ],
)
def test_an_allowed_import_passes(path: str, code: str) -> None:
    assert violations(Module(path, code)) == []
