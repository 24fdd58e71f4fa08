"""Plan a quantization: which weights, to what, and the metadata that engines read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from converters.checkpoint.coverage import check_complete
from converters.checkpoint.lock import check_unlocked
from converters.checkpoint.manifest import read_manifest
from converters.checkpoint.packing import pack_shards
from converters.checkpoint.plan import OutputPlan, SourceRows, Unit
from converters.conversion import Conversion, check_destination, passthrough_files
from converters.errors import UsageError
from converters.formats.declared import MODELOPT_FILE, QUANTIZATION_KEY
from converters.layout import Layout, Stored, StoredLayout
from converters.model_card import CARD_FILE
from converters.quant.calibrated import Calibrated
from converters.quant.card import Card
from converters.quant.choice import MEASURED, Choice, QuantizeOptions, choose
from converters.quant.engines import engine_notes, engines_of
from converters.quant.limits import check_columns, parallel_table, row_notes
from converters.quant.metadata import quantization_file, quantization_json
from converters.quant.policy import assign, fused_groups
from converters.quant.scheme import MtpPolicy, Recipe
from converters.quant.storage import known_units, kv_scale_unit, weight_unit
from converters.relayout import find_bands, gather_weights
from converters.result_config import drop_mtp, set_layout
from converters.schema import ModelSchema, Tensor
from converters.source import Source
from converters.units import UnitPlanner, dropped_layer

__all__ = ["QuantizeOptions", "plan_quantize"]


def plan_quantize(source: Source, options: QuantizeOptions) -> Conversion:
    """Return the conversion; no tensor data is read.

    Raises:
        UsageError: options that do not go together, a source that is quantized already, weights whose shape a scheme
            cannot take, statistics of another checkpoint.
    """
    _check_source(source)
    choice = choose(source.schema, options)
    job = _Job(source, options, choice)
    check_columns(source.schema, job.recipes)
    if options.rounded is not None:
        source = options.rounded.beside(source, job.recipes)
        job = replace(job, source=source)
    planner = UnitPlanner(source, job.target, None, False)
    if choice.mtp is MtpPolicy.DROP and source.schema.mtp_layer is not None:
        planner.dropped |= dropped_layer(source, source.schema.mtp_layer, "--mtp drop")
    units = [unit for stored in job.stored for unit in job.units(stored, planner)]
    plan = OutputPlan(pack_shards(units, options.max_shard_bytes), planner.dropped)
    check_complete(plan, map(source.reader.entry, source.reader.names))
    different = list(dict.fromkeys(job.recipes.values()))
    engines, limits = engines_of(different, choice.roles), parallel_table(source.config, source.schema, job.recipes)
    engines_say = engine_notes(different, choice.roles, choice.mtp, has_kv_scales=choice.has_kv_scales)
    notes = (*engines_say, *row_notes(job.schema, job.recipes))
    card = Card(
        source,
        job.schema,
        options,
        choice,
        job.recipes,
        plan,
        engines,
        limits["tensor parallel"],
        notes,
    )
    return Conversion(
        source,
        plan,
        _config(job),
        tuple(name for name in passthrough_files(source.folder) if name not in (MODELOPT_FILE, CARD_FILE)),
        "quantize",
        choice.identity(options),
        generated={**quantization_file(choice, job.schema, job.recipes), CARD_FILE: card},
        notes=notes,
        limits=limits,
        engines=engines,
    )


def check_quantize(source: Source, options: QuantizeOptions, dst: Path, *, is_redone: bool) -> None:
    """Refuse what the plan or the run would refuse, as far as it is known before a calibration.

    Args:
        source: what is to be quantized.
        options: without statistics.
        dst: the result's folder.
        is_redone: what is there already may be another job's.
    Raises:
        UsageError, LockedError: see `plan_quantize`, `converters.job_options.check_job`.
    """
    _check_source(source)
    choice = choose(source.schema, options)
    check_columns(source.schema, _Job(source, options, choice).recipes)
    check_destination(source.folder, dst)
    check_unlocked(dst)
    manifest = None if is_redone else read_manifest(dst)
    if manifest is None:
        return
    before, wanted = manifest["job"].get("options"), choice.identity(options)
    if not isinstance(before, Mapping) or any(before.get(name) != wanted[name] for name in wanted.keys() - MEASURED):
        raise UsageError(
            f"DST {dst}",
            expected="an empty or new folder",
            found="the finished result of another job",
            next_step="Redo it with --update, or choose another folder.",
        )


def _check_source(source: Source) -> None:
    if source.is_quantized:
        raise UsageError(
            str(source.folder),
            expected="an unquantized source",
            found="quantization_config in it",
            next_step="Quantizing twice adds up the errors: start from the original checkpoint, or, where it is gone, "
            f"from weights of 'glm4moe convert {source.folder} DST --dequantize'.",
        )


@dataclass(frozen=True)
class _Job:
    """One quantization: the source, what was chosen for it, and what follows from the two."""

    source: Source
    options: QuantizeOptions
    choice: Choice

    @cached_property
    def schema(self) -> ModelSchema:
        """The tensors of the result."""
        schema = self.source.schema
        is_dropped = self.choice.mtp is MtpPolicy.DROP
        return replace(schema, has_mtp=False, has_mtp_copies=False) if is_dropped else schema

    @cached_property
    def recipes(self) -> dict[str, Recipe]:
        """How each quantized weight is stored, by the tensor's name."""
        found = assign(self.source.schema, self.choice.policy)
        return {name: self.choice.recipe(scheme) for name, scheme in found.items()}

    @cached_property
    def target(self) -> StoredLayout:
        """The layout of the result: the official one."""
        return StoredLayout(self.schema, Layout.SPLIT)

    @cached_property
    def stored(self) -> tuple[Stored, ...]:
        """The tensors of the result, were they not quantized."""
        return tuple(self.target.stored.values())

    @cached_property
    def groups(self) -> dict[str, tuple[SourceRows, ...]]:
        """The source rows of all weights that share a per-tensor scale with a weight, by the tensor's name."""
        groups = fused_groups(self.schema, {name: recipe.scheme for name, recipe in self.recipes.items()})
        needing = {name: own for name, own in groups.items() if self.recipes[name].info.has_tensor_scale}
        made: dict[tuple[Tensor, ...], tuple[SourceRows, ...]] = {}
        for own in needing.values():
            if own not in made:
                made[own] = tuple(rows for tensor in own for rows in self.rows(self.target.stored[tensor.name]))
        return {name: made[own] for name, own in needing.items()}

    @cached_property
    def calibrated(self) -> Calibrated | None:
        """The statistics, if the choice needs them."""
        return Calibrated.of(self.source, self.options.stats, self.choice, self.recipes)

    def rows(self, stored: Stored) -> tuple[SourceRows, ...]:
        """Return the source rows of a weight.

        Raises:
            UsageError: it is stored in pieces that would each get scales of their own.
        """
        rows = gather_weights([find_bands(self.source, pieces) for pieces in stored.elements])
        if len(rows) > 1 or not rows[0].is_whole:
            raise UsageError(
                f"tensor {stored.name}",
                expected="a weight in one piece",
                found=f"one cut into several slots by the layout {self.source.layout}",
                next_step=f"Run 'glm4moe convert {self.source.folder} DST --layout split' first.",
            )
        return rows

    def units(self, stored: Stored, planner: UnitPlanner) -> Iterator[Unit]:
        """Yield the units of one tensor of the result, with the scales that hang on it."""
        tensor = stored.elements[0][0].tensor
        recipe = self.recipes.get(tensor.name)
        if recipe is None:
            yield from planner.units(stored)
        else:
            rows = self.rows(stored)
            dtype = self.source.reader.entry(rows[0].name).dtype
            amax = self.calibrated.input_amax(tensor) if self.calibrated and recipe.info.has_input_scale else None
            unit = weight_unit(tensor, dtype, rows, self.groups.get(tensor.name, ()), recipe)
            yield from self.options.rounded.units(tensor, unit, recipe) if self.options.rounded else (unit,)
            yield from known_units(tensor, dtype, recipe, amax)
        if self.calibrated and self.choice.has_kv_scales:
            for name, amax in self.calibrated.kv_scales(tensor, self.choice.format):
                entry = self.source.reader.entry(self.source.stored_layout.places(tensor)[0].stored.name)
                yield kv_scale_unit(name, amax, entry.dtype, self.choice.format)


def _config(job: _Job) -> dict[str, Any]:
    config: dict[str, Any] = dict(job.source.raw_config)
    if job.choice.mtp is MtpPolicy.DROP:
        drop_mtp(config)
    set_layout(config, job.source.stored_layout, job.target)
    recipes: Mapping[str, Recipe] = job.recipes
    return {**config, QUANTIZATION_KEY: quantization_json(job.choice, job.schema, recipes)}
