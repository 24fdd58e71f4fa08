"""The units of a conversion: for each stored tensor of the target layout, what is written and how it is made."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from converters.checkpoint.dtypes import BY_CONFIG_NAME
from converters.checkpoint.plan import OutputTensor, SourceRows, Unit
from converters.errors import UsageError
from converters.formats.weights import Part, Use, WeightFormat, cells
from converters.layout import Layout, Stored, StoredLayout
from converters.relayout import Band, check_equal, find_bands, gather_part, gather_weights, patches_of
from converters.schema import DtypePolicy, Role
from converters.source import Source
from converters.transforms.dequantize import Constant, Dequantize
from converters.transforms.rows import Cast, Copy

Elements = Sequence[Sequence[Band]]


@dataclass(slots=True)
class UnitPlanner:
    """Makes units for the tensors of a target layout.

    Args:
        source: where they come from.
        target: the layout that is written.
        dtype: a dtype of safetensors that plain weights are cast to; None keeps what they have.
        dequantize: write weights instead of codes and scales.
    Attributes:
        dropped: source tensors without use in the target, with the reason.
    """

    source: Source
    target: StoredLayout
    dtype: str | None
    dequantize: bool
    dropped: dict[str, str] = field(default_factory=dict)
    _scales_by_owner: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Look up KV-cache scales by the weight that they hang on."""
        for name, owner in self.source.cache_scales.items():
            self._scales_by_owner.setdefault(owner, []).append(name)

    @property
    def weight_dtype(self) -> str:
        """What dequantized weights are rounded to: the dtype asked for, else the one that the config names."""
        return self.dtype or BY_CONFIG_NAME[self.source.config.dtype]

    def units(self, stored: Stored) -> Iterator[Unit]:
        """Yield the units of one stored tensor: itself, its scales, and KV-cache scales that hang on it.

        Raises:
            UsageError: the target cannot represent it.
        """
        elements = [find_bands(self.source, pieces) for pieces in stored.elements]
        formats = list(dict.fromkeys(patch.weight.format for patch in patches_of(elements)))
        self._check_slot(stored, formats[0])
        if all(found.is_plain for found in formats):
            yield self._plain_unit(stored, elements, formats)
        elif len(formats) > 1:
            raise _different(stored, formats)
        elif self.dequantize:
            yield self._dequantize_unit(stored, elements, formats[0])
        else:
            yield from (self._part_unit(stored, elements, part) for part in formats[0].parts)
        yield from self._cache_scale_units(stored)

    def _plain_unit(self, stored: Stored, elements: Elements, formats: list[WeightFormat]) -> Unit:
        (part,) = formats[0].parts
        spec = stored.elements[0][0].tensor.spec
        keeps = self.dtype is None or spec.dtype is DtypePolicy.KEEP_FP32
        dtypes = {found.parts[0].dtype for found in formats}
        if keeps and len(dtypes) > 1:
            raise _different(stored, formats)
        target = part.dtype if keeps or self.dtype is None else self.dtype
        gathered = gather_part(stored, elements, part)
        output = OutputTensor(stored.name, target, stored.shape)
        return Unit((output,), tuple(gathered.sources), Copy() if dtypes == {target} else Cast(target))

    def _part_unit(self, stored: Stored, elements: Elements, part: Part) -> Unit:
        """Return the unit that copies one part of a quantized tensor."""
        name = stored.part(part.suffix)
        if part.use is Use.SHAPE:
            return self._shape_unit(name, stored, elements, part)
        gathered = gather_part(stored, elements, part)
        check_equal(self.source.reader, gathered.equal)
        grid = cells(stored.rows, part.grain[0]), cells(stored.columns, part.grain[1])
        output = OutputTensor(name, part.dtype, part.form.shape(stored.stack, *grid))
        return Unit((output,), tuple(gathered.sources), Copy(), tuple(other for _, other in gathered.equal))

    def _shape_unit(self, name: str, stored: Stored, elements: Elements, part: Part) -> Unit:
        """Return the unit that writes the unpacked shape: copied where it stays what it is."""
        weights = {patch.stored.name: patch.stored for patch in patches_of(elements)}
        entries = [self.source.reader.entry(weight.part(part.suffix)) for weight in weights.values()]
        output = OutputTensor(name, part.dtype, (len(stored.shape),))
        if [weight.shape for weight in weights.values()] == [stored.shape]:
            return Unit((output,), (SourceRows(entries[0].name, 0, entries[0].rows),), Copy())
        self._check_shapes(list(weights.values()), part)
        known = tuple(SourceRows(entry.name, 0, entry.rows, is_shared=True) for entry in entries)
        return Unit((output,), (), Constant(stored.shape, part.dtype), known)

    def _dequantize_unit(self, stored: Stored, elements: Elements, found: WeightFormat) -> Unit:
        weights = list({patch.stored.name: patch.stored for patch in patches_of(elements)}.values())
        for part in (*found.used(Use.SHAPE), *found.used(Use.ACTIVATION)):
            if part.use is Use.SHAPE:
                self._check_shapes(weights, part)
            self.dropped |= {weight.part(part.suffix): "--dequantize" for weight in weights}
        (columns,) = {weight.columns for weight in weights}
        assert found.coding is not None, found
        group = found.used(Use.SCALE)[0].grain[1] or columns
        transform = Dequantize(found.coding, found.num_bits, columns, group, self.weight_dtype)
        output = OutputTensor(stored.name, self.weight_dtype, stored.shape)
        return Unit((output,), gather_weights(elements), transform)

    def _check_shapes(self, weights: Sequence[Stored], part: Part) -> None:
        """Hold the shape that a packed weight states against the one that its config gives it."""
        for weight in weights:
            name = weight.part(part.suffix)
            values = self.source.reader.read(name).tolist()
            if tuple(values) != weight.shape:
                raise UsageError(
                    f"tensor {name}", expected=f"{list(weight.shape)}, the shape of its weight", found=str(values)
                )

    def _cache_scale_units(self, stored: Stored) -> Iterator[Unit]:
        names = [name for piece in stored.elements[0] for name in self._scales_by_owner.get(piece.tensor.name, ())]
        for name in names:
            if self.dequantize:
                self.dropped[name] = "--dequantize"
            else:
                yield copy_unit(self.source, name)

    def _check_slot(self, stored: Stored, found: WeightFormat) -> None:
        """Refuse a shared expert that becomes a slot among experts stored otherwise: engines assume one format."""
        tensor = stored.elements[0][0].tensor
        is_slot = self.target.layout is Layout.FUSED_SHARED and tensor.spec.role is Role.SHARED_EXPERT
        if not is_slot or self.dequantize or self.source.layout is Layout.FUSED_SHARED:
            return
        expert = self.source.schema.tensor(Role.EXPERT, tensor.spec.part, tensor.layer, 0)
        place = self.source.stored_layout.places(expert)[0]
        routed = self.source.weights[place.stored.name].format
        if routed != found and not (self.dtype and routed.is_plain and found.is_plain):
            raise _different(stored, [routed, found])


def copy_unit(source: Source, name: str) -> Unit:
    """Return the unit that copies one tensor bit for bit."""
    entry = source.reader.entry(name)
    output = OutputTensor(name, entry.dtype, entry.shape)
    return Unit((output,), (SourceRows(name, 0, output.rows),), Copy())


def _different(stored: Stored, formats: Sequence[WeightFormat]) -> UsageError:
    kinds = dict.fromkeys(f"{found.name} ({', '.join(part.dtype for part in found.parts)})" for found in formats)
    plain = all(found.is_plain for found in formats)
    return UsageError(
        f"tensor {stored.name}",
        expected="everything that is stored together in one format",
        found=" and ".join(kinds),
        next_step=f"Add {'--dtype' if plain else '--dequantize'}, or choose --layout split.",
    )


def dropped_layer(source: Source, layer: int, reason: str) -> dict[str, str]:
    """Return every stored tensor of a layer with the reason for which it is left out."""
    weights = [weight for weight in source.weights.values() if weight.stored.layer == layer]
    names = [weight.stored.part(suffix) for weight in weights for suffix in weight.entries]
    tensors = source.schema.tensors
    names += [name for name, owner in source.cache_scales.items() if tensors[owner].layer == layer]
    return dict.fromkeys(names, reason)
