"""NVFP4 from one dialect to the other without touching a code: names, reciprocals of global scales, config.

Codes and local scales keep their bytes; `weight_packed` is called `weight` by ModelOpt. compressed-tensors' global
scales, `weight_global_scale` and `input_global_scale`, are of shape [1] and divide; ModelOpt's, `weight_scale_2` and
`input_scale`, are scalars and multiply. Scales of the KV cache hang on the attention module there, on its projections
here.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from converters.checkpoint.coverage import check_complete
from converters.checkpoint.packing import DEFAULT_MAX_SHARD_BYTES, pack_shards
from converters.checkpoint.plan import OutputPlan, OutputTensor, SourceRows, Unit
from converters.conversion import Conversion, passthrough_files
from converters.errors import InputError, UsageError
from converters.formats import compressed_tensors, modelopt
from converters.formats.declared import MODELOPT_FILE, QUANTIZATION_KEY
from converters.formats.ignore import compressed_tensors_ignore, modelopt_ignore
from converters.formats.weights import Coding, Part, Use
from converters.layout import Layout
from converters.model_card import CARD_FILE, card_notes
from converters.quant.policy import parent
from converters.quant.scheme import Format
from converters.schema import CACHE_SCALES
from converters.source import Source, StoredWeight
from converters.transforms.reciprocal import Reciprocal
from converters.transforms.rows import Copy, RowTransform
from converters.units import copy_unit

FORMATS = (Format.COMPRESSED_TENSORS, Format.MODELOPT)
_CODINGS = {Format.COMPRESSED_TENSORS: Coding.NVFP4_DIVISOR, Format.MODELOPT: Coding.NVFP4_FACTOR}
# codes, local scale, global scale, scale of the inputs
_SUFFIXES = {
    Format.COMPRESSED_TENSORS: ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
    Format.MODELOPT: ("weight", "weight_scale", "weight_scale_2", "input_scale"),
}
# the reciprocal of a smaller or larger number is no normal one
_SMALLEST_NORMAL, _LARGEST = 2.0**-126, 2.0**126


@dataclass(frozen=True, slots=True, kw_only=True)
class ReformatOptions:
    """Whose names and config to write."""

    format: Format
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES


def plan_reformat(source: Source, options: ReformatOptions) -> Conversion:
    """Return the conversion; of the tensors' data, the global scales are read.

    Raises:
        UsageError: the source is not NVFP4 of the other dialect, or not in the split layout.
        InputError: a global scale is zero, negative, not finite, or missing for some weights only.
    """
    job = _Reformat(source, options.format)
    job.check()
    units = [unit for weight in source.weights.values() for unit in job.units(weight)]
    units += [job.cache_unit(name, owner) for name, owner in source.cache_scales.items()]
    plan = OutputPlan(pack_shards(units, options.max_shard_bytes))
    check_complete(plan, map(source.reader.entry, source.reader.names))
    described = (MODELOPT_FILE, CARD_FILE)
    passthrough = tuple(name for name in passthrough_files(source.folder) if name not in described)
    config = {**source.raw_config, QUANTIZATION_KEY: job.block}
    identity = {"format": options.format.value, "max_shard_bytes": options.max_shard_bytes}
    notes = card_notes(source)
    return Conversion(source, plan, config, passthrough, "convert", identity, generated=job.generated, notes=notes)


@dataclass(frozen=True)
class _Reformat:
    """One way: from a source to a dialect."""

    source: Source
    to: Format

    @cached_property
    def quantized(self) -> dict[str, StoredWeight]:
        """The weights that are stored as codes, by the official name; in the split layout that is their own."""
        return {name: weight for name, weight in self.source.weights.items() if not weight.format.is_plain}

    @cached_property
    def has_input_scales(self) -> bool:
        """Whether the activations are quantized as well."""
        return any(weight.format.used(Use.ACTIVATION) for weight in self.quantized.values())

    @property
    def scheme(self) -> str:
        """Its name on the command line."""
        return "nvfp4" if self.has_input_scales else "nvfp4-weight-only"

    @property
    def has_kv_scales(self) -> bool:
        """Whether scales of an FP8 KV cache are there."""
        return bool(self.source.cache_scales)

    @property
    def block(self) -> dict[str, Any]:
        """The quantization_config."""
        schema, names = self.source.schema, self.quantized.keys()
        if self.to is Format.MODELOPT:
            exclude = modelopt_ignore(schema, names)
            return modelopt.quantization_config(self.scheme, exclude, has_kv_scales=self.has_kv_scales)
        groups = [compressed_tensors.Group(self.scheme)]
        ignore = compressed_tensors_ignore(schema, names)
        return compressed_tensors.quantization_config(groups, ignore, has_kv_scales=self.has_kv_scales)

    @property
    def generated(self) -> dict[str, bytes]:
        """The files beside config.json."""
        if self.to is not Format.MODELOPT:
            return {}
        exclude = modelopt_ignore(self.source.schema, self.quantized.keys())
        return {MODELOPT_FILE: modelopt.quantization_file(self.scheme, exclude, has_kv_scales=self.has_kv_scales)}

    def check(self) -> None:
        """Refuse what cannot be converted.

        Raises:
            UsageError, InputError: see `plan_reformat`.
        """
        option = f"--format {self.to}"
        if not self.quantized:
            raise UsageError(option, expected="a source with NVFP4 weights", found="no quantized weight in it")
        if self.source.layout is not Layout.SPLIT:
            raise UsageError(
                option,
                expected="a source in the split layout",
                found=self.source.layout,
                next_step=f"Run 'glm4moe convert {self.source.folder} DST --layout split' first.",
            )
        (other,) = (coding for format_, coding in _CODINGS.items() if format_ is not self.to)
        for name, weight in self.quantized.items():
            if weight.format.coding is not other:
                found = f"{weight.format.name} ({weight.format.coding}) in {name}"
                raise UsageError(option, expected=f"NVFP4 weights of the other dialect ({other})", found=found)
            self._check_globals(name, weight)

    def _check_globals(self, name: str, weight: StoredWeight) -> None:
        if bool(weight.format.used(Use.ACTIVATION)) is not self.has_input_scales:
            raise InputError(
                f"tensor {name}",
                expected="a scale of its inputs, as other weights have",
                found="none",
                next_step="Calibrate and quantize the original again.",
            )
        for part in (weight.format.used(Use.SCALE)[1], *weight.format.used(Use.ACTIVATION)):
            scale = weight.stored.part(part.suffix)
            data = bytearray(4)
            self.source.reader.read_into(scale, 0, memoryview(data))
            (value,) = struct.unpack("<f", data)
            # written so that NaN is refused
            if not (math.isfinite(value) and _SMALLEST_NORMAL <= value <= _LARGEST):
                raise InputError(
                    f"tensor {scale}",
                    expected="a positive, finite scale whose reciprocal is one too",
                    found=f"{value:.6g}",
                    next_step="Zero often means an expert that calibration never reached. Quantize the original again.",
                )

    def units(self, weight: StoredWeight) -> Iterator[Unit]:
        """Yield the units of a weight: copied, under new names where it is quantized."""
        if weight.format.is_plain:
            yield copy_unit(self.source, weight.stored.name)
            return
        codes, local, whole, inputs = _SUFFIXES[self.to]
        scales = weight.format.used(Use.SCALE)
        yield self._unit(weight, weight.format.used(Use.CODES)[0], codes, Copy())
        yield self._unit(weight, scales[0], local, Copy())
        yield self._unit(weight, scales[1], whole, Reciprocal())
        for part in weight.format.used(Use.ACTIVATION):
            yield self._unit(weight, part, inputs, Reciprocal())

    def _unit(self, weight: StoredWeight, part: Part, suffix: str, transform: RowTransform) -> Unit:
        entry = weight.entries[part.suffix]
        shape = self._single if isinstance(transform, Reciprocal) else entry.shape
        return _renamed(entry.name, f"{weight.stored.module}.{suffix}", entry.dtype, shape, transform)

    @property
    def _single(self) -> tuple[int, ...]:
        return () if self.to is Format.MODELOPT else (1,)

    def cache_unit(self, name: str, owner: str) -> Unit:
        """Return the unit of a scale of the KV cache, which keeps its value and dtype.

        Raises:
            UsageError: it is one of several, one for each head.
        """
        tensor, entry = self.source.schema.tensors[owner], self.source.reader.entry(name)
        suffix = name.rpartition(".")[2]
        if entry.shape not in ((), (1,)) or suffix not in CACHE_SCALES:
            raise UsageError(f"tensor {name}", expected="one scale for all heads", found=str(list(entry.shape)))
        if suffix == "output_scale":
            # an older spelling on the projection itself
            suffix = f"{tensor.module.rpartition('.')[2][0]}_scale"
        module = tensor.module if self.to is Format.MODELOPT else parent(tensor)
        return _renamed(name, f"{module}.{suffix}", entry.dtype, self._single, Copy())


def _renamed(name: str, to: str, dtype: str, shape: tuple[int, ...], transform: RowTransform) -> Unit:
    output = OutputTensor(to, dtype, shape)
    return Unit((output,), (SourceRows(name, 0, output.rows),), transform)
