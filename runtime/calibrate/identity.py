"""What an unfinished calibration is told apart by: everything that decides the bytes of its result."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from converters.quant.rounded import recipe_json
from converters.quant.scheme import Recipe
from converters.source import Source

# of what state.py keeps; another one is not gone on with
_STATE = 1


def job_identity(source: Source, provenance: Mapping[str, Any], recipes: Mapping[str, Recipe]) -> dict[str, Any]:
    """Return the facts that must be the same for a run to go on with what another one left, each a plain value.

    Beside the provenance: the files of the source by size and time, since a digest of their content would cost as much
    as the run; and torch, whose next version may add in another order.
    """
    facts = {name: value for name, value in provenance.items() if name not in ("texts", "gptq")}
    for number, text in enumerate(provenance["texts"], 1):
        facts[f"text {number}"] = ", ".join(f"{name} {value}" for name, value in text.items())
    index = source.reader.index
    stats = {file: source.reader.path(file).stat() for file in index.files}
    files = sorted((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats.items())
    facts["source files"] = f"{len(files)}, sha256 over names, sizes and times {_digest(files)}"
    return {**facts, **_stored(recipes), "torch": torch.__version__, "state": _STATE}


def _stored(recipes: Mapping[str, Recipe]) -> dict[str, str]:
    """Return how rounded weights are stored: each property with all values that it has, and which weights have them."""
    found: dict[str, set[str]] = {}
    for recipe in recipes.values():
        for name, value in recipe_json(recipe).items():
            found.setdefault(name, set()).add(str(value))
    facts = {name: ", ".join(sorted(values)) for name, values in found.items()}
    names = {name: recipe_json(recipe) for name, recipe in recipes.items()}
    return facts | ({"rounded": f"{len(names)} weights, sha256 {_digest(names)}"} if names else {})


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
