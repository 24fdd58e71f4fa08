"""What `quantization_config` promises about each tensor: stored plain, or as codes with a scale beside them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.checkpoint.dtypes import FLOAT_DTYPES
from converters.checkpoint.header import TensorEntry
from converters.errors import ConfigError
from converters.formats.compressed_tensors import QUANT_METHOD
from converters.formats.declared import declared_schemes, read_quantization
from converters.formats.weights import PartRule, Scheme, Use, cells
from converters.layout import Stored
from converters.quant.policy import is_quantized
from converters.schema import Role, Tensor

_SUBJECT = "config.json: quantization_config"
_REGEX_PREFIX = "re:"
# the class name that stands for every linear module
_ANY_LINEAR = "Linear"
# of ModelOpt
_WEIGHT_ONLY_ALGORITHMS = frozenset({"W4A16_NVFP4", "FP8_PB_WO"})
Entries = Mapping[str, TensorEntry]


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A tensor that must or may be on disk for a stored weight, with what it may look like there."""

    suffix: str
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    is_optional: bool = False

    @property
    def expected(self) -> str:
        """In words."""
        return f"{' or '.join(self.dtypes)} {' or '.join(str(list(shape)) for shape in self.shapes)}"

    def accepts(self, entry: TensorEntry) -> bool:
        """Return whether a tensor may be this part."""
        return entry.dtype in self.dtypes and entry.shape in self.shapes


@dataclass(frozen=True, slots=True)
class StoredForm:
    """How a stored tensor must lie on disk.

    Attributes:
        parts: all that may be there.
        codes: suffix of the part that holds the values.
        scheme: its name; None for a tensor that is not quantized.
    """

    parts: tuple[StoredPart, ...]
    codes: str = ""
    scheme: str | None = None


@dataclass(frozen=True, slots=True)
class QuantizationRule:
    """Which linear modules are quantized: those that `targets` name and `ignore` does not.

    Entries are module names, `re:` patterns matched from the start of the name, or, as a target, the class `Linear`.
    """

    targets: "ModuleSet"
    ignore: "ModuleSet"

    def covers(self, tensor: Tensor) -> bool:
        """Return whether the config says that this tensor is quantized."""
        if len(tensor.shape) != 2 or tensor.module in self.ignore:
            return False
        return _ANY_LINEAR in self.targets or tensor.module in self.targets

    def covers_stored(self, stored: Stored) -> bool:
        """Return the same of a tensor of any layout: lists may have its own name, patterns are often still official."""
        tensors = [piece.tensor for pieces in stored.elements for piece in pieces]
        if stored.module in self.ignore or len(tensors[0].shape) != 2:
            return False
        named = stored.module in self.targets and all(tensor.module not in self.ignore for tensor in tensors)
        return named or all(map(self.covers, tensors))


@dataclass(frozen=True, slots=True)
class ModuleSet:
    """Modules by exact name or by pattern; a real ignore list has hundreds of names and is asked 50,000 times."""

    names: frozenset[str]
    patterns: tuple[re.Pattern[str], ...]

    def __contains__(self, module: str) -> bool:
        return module in self.names or any(pattern.match(module) for pattern in self.patterns)

    @classmethod
    def parse(cls, entries: Any, subject: str) -> "ModuleSet":
        """Read a list of names and `re:` patterns.

        Raises:
            ConfigError: something else, or a pattern that is no regular expression.
        """
        if not isinstance(entries, list) or any(type(entry) is not str for entry in entries):
            raise ConfigError(subject, expected="a list of module names and re: patterns", found=repr(entries)[:80])
        patterns = [entry for entry in entries if entry.startswith(_REGEX_PREFIX)]
        compiled = tuple(_compile(entry, subject) for entry in patterns)
        return cls(frozenset(entries).difference(patterns), compiled)


def _compile(entry: str, subject: str) -> re.Pattern[str]:
    try:
        return re.compile(entry.removeprefix(_REGEX_PREFIX))
    except re.error as error:
        raise ConfigError(f"{subject} {entry!r}", expected="a regular expression", found=str(error)) from error


@dataclass(frozen=True, slots=True)
class Declaration:
    """What quantization_config declares.

    Attributes:
        schemes: how a quantized weight may be stored.
        rule: which modules are quantized; None in a dialect that does not say so by exact names.
        quantizes_inputs: activations are quantized too, in at least one group.
        method: the dialect, as the config calls it.
        groups: targets of each group, with how its weights may be stored; the first that has a module counts.
    """

    schemes: tuple[Scheme, ...]
    rule: QuantizationRule | None
    quantizes_inputs: bool = True
    method: str = QUANT_METHOD
    groups: tuple[tuple[ModuleSet, tuple[Scheme, ...]], ...] = ()

    def form(self, stored: Stored, entries: Entries) -> StoredForm:
        """Return how a tensor must lie on disk; `entries`, what is there, only decide where the config leaves it open.

        Router, norms, embeddings and heads are plain even where a rule forgets to name them in `ignore`; a head copy
        of the MTP layer may be quantized, as the official FP8 releases have it.
        """
        tensor = stored.elements[0][0].tensor
        codes = entries.get("")
        is_plain_here = codes is not None and codes.dtype in FLOAT_DTYPES
        is_free = self.rule is None or tensor.spec.role is Role.MTP_HEAD
        if not is_quantized(tensor) and tensor.spec.role is not Role.MTP_HEAD:
            return plain_form(stored)
        if (is_free and (is_plain_here or not entries)) or (self.rule and not self.rule.covers_stored(stored)):
            return plain_form(stored)
        return _quantized_form(stored, _choose(self._schemes_of(stored), entries))

    def _schemes_of(self, stored: Stored) -> tuple[Scheme, ...]:
        names = (_ANY_LINEAR, stored.module, stored.elements[0][0].tensor.module)
        found = (schemes for targets, schemes in self.groups if any(name in targets for name in names))
        return next(found, self.schemes)


def plain_form(stored: Stored) -> StoredForm:
    """Return the form of a tensor that is not quantized."""
    return StoredForm((StoredPart("", FLOAT_DTYPES, (stored.shape,)),))


def _choose(schemes: Sequence[Scheme], entries: Entries) -> Scheme:
    """Return the first scheme whose parts are those on disk, else the first of all."""
    for scheme in schemes:
        required = {rule.suffix for rule in scheme.parts if not rule.is_optional}
        if required <= entries.keys() <= {rule.suffix for rule in scheme.parts}:
            return scheme
    return schemes[0]


def _quantized_form(stored: Stored, scheme: Scheme) -> StoredForm:
    codes = next(rule.suffix for rule in scheme.parts if rule.use is Use.CODES)
    return StoredForm(tuple(_part(stored, rule) for rule in scheme.parts), codes, scheme.name)


def _part(stored: Stored, rule: PartRule) -> StoredPart:
    grid = cells(stored.rows, rule.grain[0]), cells(stored.columns, rule.grain[1])
    shapes = tuple(form.shape(stored.stack, *grid) for form in rule.forms)
    if rule.use is Use.SHAPE:
        # a value for each dim
        shapes = ((len(stored.shape),),)
    return StoredPart(rule.suffix, rule.dtypes, shapes, rule.is_optional)


def parse_quantization(raw_config: Mapping[str, Any], folder: Path) -> Declaration | None:
    """Read what a checkpoint declares about quantization; None where it declares nothing.

    Raises:
        ConfigError: a method or scheme that is not implemented, or a block that is not as the format has it.
    """
    block = read_quantization(raw_config, folder)
    if block is None:
        return None
    schemes = declared_schemes(block)
    if block.get("quant_method") != QUANT_METHOD:
        return Declaration(
            schemes, None, block.get("quant_algo") not in _WEIGHT_ONLY_ALGORITHMS, str(block.get("quant_method"))
        )
    targets = [_group_targets(name, group) for name, group in block["config_groups"].items()]
    union = ModuleSet(
        frozenset().union(*(target.names for target in targets)),
        tuple(pattern for target in targets for pattern in target.patterns),
    )
    rule = QuantizationRule(union, ModuleSet.parse(block.get("ignore", []), f"{_SUBJECT}.ignore"))
    inputs = (group.get("input_activations") for group in block["config_groups"].values())
    own = (
        declared_schemes({**block, "config_groups": {name: group}}) for name, group in block["config_groups"].items()
    )
    groups = tuple(zip(targets, own, strict=True))
    return Declaration(schemes, rule, any(args is not None for args in inputs), groups=groups)


def _group_targets(name: str, group: Mapping[str, Any]) -> ModuleSet:
    return ModuleSet.parse(group.get("targets"), f"{_SUBJECT}.config_groups.{name}.targets")
