"""What calibration measured: the largest input of every linear module, the largest keys and values of every layer.

One JSON file with sorted keys, one module a line, so that equal statistics are equal bytes:

    schema      glm4moe.stats/1
    provenance  what was calibrated, on which text, how
    layers      by number: key_amax, value_amax
    modules     by official name: input_amax, tokens, upper bounds of percentiles; filled, where that was needed
"""

import hashlib
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from converters.checkpoint.disk_read import read_file
from converters.checkpoint.writer import write_file
from converters.config import read_json
from converters.errors import InputError, UsageError
from converters.schema import Role, parse

SCHEMA = "glm4moe.stats/1"
MAX_STATS_BYTES = 256 << 20
# shares of a module's inputs, with their names in the file
PERCENTILES = {"p99.9": Fraction(999, 1000), "p99.99": Fraction(9999, 10000)}
_LAYER_KEYS = {"key_amax", "value_amax"}
_MODULE_KEYS = {"input_amax", "tokens"}


@dataclass(frozen=True)
class CalibrationStats:
    """Statistics of the inputs of linear modules, by official module name; the MTP layer's are included.

    Args:
        input_amax: largest magnitude, fp32; weights that engines multiply as one have the same by construction.
        key_amax: by layer, of K as the cache holds it: after norm and rotary embedding.
        value_amax: by layer, of V.
        tokens: tokens of the text that each module saw; for an expert, those that were routed to it.
        filled: modules with too few tokens, with what their statistics are made of instead.
        provenance: model_digest, sha256 of the texts, num_tokens, context_length, seed, version and more.
        percentiles: by module, for each name of PERCENTILES a bound that so many of its inputs do not exceed.
    """

    input_amax: dict[str, float]
    key_amax: dict[int, float]
    value_amax: dict[int, float]
    tokens: dict[str, int]
    filled: dict[str, str]
    provenance: dict[str, Any]
    percentiles: dict[str, dict[str, float]] = field(default_factory=dict)

    @cached_property
    def data(self) -> bytes:
        """The file, byte for byte."""
        layers = {
            str(layer): {"key_amax": self.key_amax[layer], "value_amax": self.value_amax[layer]}
            for layer in sorted(self.key_amax)
        }
        head = {"schema": SCHEMA, "provenance": self.provenance, "layers": layers}
        lines = ",\n".join(f" {json.dumps(name)}: {_line(self._module(name))}" for name in sorted(self.input_amax))
        parts = ",\n".join(f"{json.dumps(key)}: {_line(value)}" for key, value in head.items())
        return f'{{\n{parts},\n"modules": {{\n{lines}\n}}\n}}\n'.encode()

    @property
    def sha256(self) -> str:
        """Digest of the file."""
        return hashlib.sha256(self.data).hexdigest()

    def save(self, path: Path) -> None:
        """Write the file atomically; one that holds the same already is left alone.

        Raises:
            UsageError: there is another file. ResourceError: no room.
        """
        if path.exists():
            if path.is_file() and read_file(path) == self.data:
                return
            raise other_file(path)
        write_file(path, self.data)

    @classmethod
    def load(cls, path: Path) -> "CalibrationStats":
        """Read a file that `save` wrote.

        Raises:
            UsageError: there is no such file. InputError: it holds something else.
        """
        if not path.is_file():
            raise UsageError(
                f"statistics {path}",
                expected="a file of 'glm4moe calibrate'",
                found="something else" if path.exists() else "none",
                next_step=f"Run 'glm4moe calibrate CKPT {path} --text FILE' first.",
            )
        raw = read_json(path, MAX_STATS_BYTES)
        if raw.get("schema") != SCHEMA:
            raise InputError(f"{path}: schema", expected=SCHEMA, found=repr(raw.get("schema")))
        for key in ("provenance", "layers", "modules"):
            if not isinstance(raw.get(key), dict):
                raise InputError(f"{path}: {key}", expected="an object", found=type(raw.get(key)).__name__)
        layers = {_layer(path, name): _amaxes(path, name, value) for name, value in raw["layers"].items()}
        modules = {name: _checked_module(path, name, value) for name, value in raw["modules"].items()}
        return cls(
            input_amax={name: float(value["input_amax"]) for name, value in modules.items()},
            key_amax={layer: float(value["key_amax"]) for layer, value in layers.items()},
            value_amax={layer: float(value["value_amax"]) for layer, value in layers.items()},
            tokens={name: value["tokens"] for name, value in modules.items()},
            filled={name: value["filled"] for name, value in modules.items() if "filled" in value},
            provenance=raw["provenance"],
            percentiles={name: bounds for name, value in modules.items() if (bounds := _bounds(value))},
        )

    def _module(self, name: str) -> dict[str, Any]:
        facts: dict[str, Any] = {"input_amax": self.input_amax[name], "tokens": self.tokens[name]}
        facts |= self.percentiles.get(name, {})
        return facts | ({"filled": self.filled[name]} if name in self.filled else {})


@dataclass(frozen=True, slots=True)
class LayerCoverage:
    """How a layer's routed experts fared: fewest and median tokens routed to one, and how many were filled."""

    layer: int
    experts: int
    min_tokens: int
    median_tokens: float
    filled: int


def coverage(module_tokens: Mapping[str, int], filled_modules: Mapping[str, str]) -> list[LayerCoverage]:
    """Return the coverage of every layer with routed experts, in order, from `tokens` and `filled` of statistics."""
    tokens: dict[int, dict[int, int]] = {}
    filled: dict[int, set[int]] = {}
    for name, count in module_tokens.items():
        parsed = parse(f"{name}.weight")
        if parsed.spec.role is Role.EXPERT and parsed.layer is not None and parsed.expert is not None:
            tokens.setdefault(parsed.layer, {})[parsed.expert] = count
            if name in filled_modules:
                filled.setdefault(parsed.layer, set()).add(parsed.expert)
    return [
        LayerCoverage(
            layer, len(seen), min(seen.values()), statistics.median(seen.values()), len(filled.get(layer, ()))
        )
        for layer, seen in sorted(tokens.items())
    ]


def other_file(path: Path) -> UsageError:
    """Return the error for a STATS that holds something else."""
    return UsageError(
        f"STATS {path}",
        expected="a new file, or one with the same statistics",
        found="another file",
        next_step="Remove it or choose another name; nothing is overwritten.",
    )


def _line(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _layer(path: Path, name: str) -> int:
    if not (name.isdecimal() and name.isascii() and str(int(name)) == name):
        raise InputError(f"{path}: layers", expected="numbers of layers", found=repr(name))
    return int(name)


def _amaxes(path: Path, name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict) or value.keys() != _LAYER_KEYS or not all(map(_is_magnitude, value.values())):
        raise InputError(f"{path}: layer {name}", expected="key_amax and value_amax, finite", found=repr(value)[:200])
    return value


def _checked_module(path: Path, name: str, value: Any) -> Mapping[str, Any]:
    parse(f"{name}.weight")
    known = isinstance(value, dict) and _MODULE_KEYS <= value.keys() <= {*_MODULE_KEYS, *PERCENTILES, "filled"}
    if (
        not known
        or not all(_is_magnitude(value[key]) for key in value.keys() - {"tokens", "filled"})
        or type(value["tokens"]) is not int
        or value["tokens"] < 0
        or type(value.get("filled", "")) is not str
    ):
        raise InputError(f"{path}: module {name}", expected="input_amax and tokens, finite", found=repr(value)[:200])
    return value


def _bounds(value: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value[name]) for name in PERCENTILES if name in value}


def _is_magnitude(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0
