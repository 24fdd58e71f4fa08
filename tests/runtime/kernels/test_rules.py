"""What every kernel keeps: a twin of the same name and parameters, and nothing that the interpreter cannot run."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from runtime.kernels import moe, ops, twins

KERNELS = Path(inspect.getfile(moe)).parents[1]
# an order of additions that may change, tiles that measuring picks, and what no interpreter knows
FORBIDDEN = re.compile(r"atomic_|autotune|inline_asm|libdevice|gdc_|launch_pdl|extra\.cuda")


def public(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """Return the functions that a module defines for others."""
    functions = inspect.getmembers(module, inspect.isfunction)
    return {name: one for name, one in functions if one.__module__ == module.__name__ and not name.startswith("_")}


def launchers() -> Iterator[tuple[str, str]]:
    """Yield module and name of each function that launches kernels: what has a `_launch` or `_launches` beside it."""
    for package in (moe, ops):
        for found in pkgutil.iter_modules(package.__path__):
            functions = public(importlib.import_module(f"{package.__name__}.{found.name}"))
            for name in functions:
                if re.sub(r"_launch(es)?$", "", name) in functions.keys() - {name}:
                    yield f"{package.__name__}.{found.name}", re.sub(r"_launch(es)?$", "", name)


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    return [(one.name, one.kind) for one in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize(("module", "name"), [*launchers(), ("runtime.kernels.moe.combine", "combine_norm")])
def test_kernel_has_a_twin_of_its_name_and_parameters(module: str, name: str) -> None:
    twin = importlib.import_module(f"{twins.__name__}.{module.rpartition('.')[2]}")
    kernel = getattr(importlib.import_module(module), name)
    assert parameters(getattr(twin, name)) == parameters(kernel)


def test_all_kernels_were_looked_at() -> None:
    found = {name for _, name in launchers()}
    assert {"up", "down", "up_gemv", "build_masked_rows", "combine", "route", "paged_attention", "sample"} <= found
    assert len(found) >= 17, found


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda path: path.stem)
def test_kernels_use_nothing_that_is_not_reproducible_or_not_interpreted(path: Path) -> None:
    assert FORBIDDEN.findall(path.read_text(encoding="utf-8")) == []


def test_what_is_forbidden_is_seen() -> None:
    assert FORBIDDEN.findall("tl.atomic_add(out, x)\n@triton.autotune") == ["atomic_", "autotune"]
