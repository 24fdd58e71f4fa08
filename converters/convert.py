"""Plan a conversion: another layout or dtype, weights instead of codes, new shards, the MTP layer moved or dropped."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from converters.carried_card import carried_card
from converters.checkpoint.content_digest import Algorithm
from converters.checkpoint.coverage import check_complete
from converters.checkpoint.dtypes import BY_CONFIG_NAME
from converters.checkpoint.index import MTP_FILE
from converters.checkpoint.packing import DEFAULT_MAX_SHARD_BYTES, pack_shards
from converters.checkpoint.plan import OutputPlan, Shard, Unit
from converters.config import read_json
from converters.conversion import Conversion, FromRecords, passthrough_files
from converters.errors import UsageError
from converters.formats.declared import MODELOPT_FILE, QUANTIZATION_KEY
from converters.layout import Layout, Stored, StoredLayout
from converters.model_card import CARD_FILE, card_notes
from converters.result_config import drop_mtp, rename_modelopt, set_dtype, set_layout
from converters.source import Source
from converters.transforms.rows import Cast
from converters.units import UnitPlanner, dropped_layer


class MtpChoice(StrEnum):
    """What becomes of the MTP layer."""

    KEEP = "keep"
    DROP = "drop"
    SEPARATE = "separate"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """What to change; None keeps what the source has. `dtype` is a config.json name: bfloat16, float16, float32.

    `digest`: by which the manifest knows what is written; None: the planner's choice.
    """

    layout: Layout | None = None
    dtype: str | None = None
    dequantize: bool = False
    mtp: MtpChoice = MtpChoice.KEEP
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES
    digest: Algorithm | None = None


def plan_convert(source: Source, options: ConvertOptions) -> Conversion:
    """Return the conversion; of the tensors' data, at most scales that would have to be shared are read.

    Raises:
        UsageError: the options cannot work on this source.
    """
    check_options(source, options)
    target = StoredLayout(source.schema, options.layout) if options.layout else source.stored_layout
    dtype = BY_CONFIG_NAME[options.dtype] if options.dtype else None
    planner = UnitPlanner(source, target, dtype, options.dequantize)
    mtp_layer = source.schema.mtp_layer
    is_mtp = {stored.name: mtp_layer is not None and stored.layer == mtp_layer for stored in target.stored.values()}
    separate: tuple[Shard, ...] = ()
    if options.mtp is MtpChoice.DROP and mtp_layer is not None:
        planner.dropped |= dropped_layer(source, mtp_layer, "--mtp drop")
    elif options.mtp is MtpChoice.SEPARATE:
        separate = (Shard(MTP_FILE, _units(planner, (t for t in target.stored.values() if is_mtp[t.name]))),)
    keep_mtp = options.mtp is MtpChoice.KEEP
    body = [stored for stored in target.stored.values() if keep_mtp or not is_mtp[stored.name]]
    shards = pack_shards(_units(planner, body), options.max_shard_bytes)
    plan = OutputPlan((*shards, *separate), planner.dropped, digest=options.digest or Algorithm.SHA256)
    check_complete(plan, map(source.reader.entry, source.reader.names))
    generated = generated_files(source, target, options)
    config = new_config(source, target, options)
    if options.dtype is not None and not _is_cast(source, plan, config, options):
        options = replace(options, dtype=None)
    return Conversion(
        source,
        plan,
        config,
        tuple(name for name in passthrough(source, options) if name not in generated),
        "convert",
        # what is meant, however it was asked for
        asdict(replace(options, layout=target.layout, digest=plan.digest)),
        generated=generated,
        notes=card_notes(source) if options.dequantize else (),
    )


def _is_cast(source: Source, plan: OutputPlan, config: dict[str, Any], options: ConvertOptions) -> bool:
    """Return whether --dtype changes anything: it may ask for what is there already."""
    without = new_config(source, source.stored_layout, replace(options, dtype=None, layout=None))
    names = ("dtype", "torch_dtype")
    same_config = [config.get(name) for name in names] == [without.get(name) for name in names]
    restored = options.dequantize and options.dtype != source.config.dtype
    units = (unit for shard in plan.shards for unit in shard.units)
    return not same_config or restored or any(isinstance(unit.transform, Cast) for unit in units)


def _units(planner: UnitPlanner, tensors: Iterable[Stored]) -> tuple[Unit, ...]:
    return tuple(unit for stored in tensors for unit in planner.units(stored))


def check_options(source: Source, options: ConvertOptions) -> None:
    """Refuse options that make no sense for a source.

    Raises:
        UsageError: with the option's name.
    """
    if options.dtype is not None and options.dtype not in BY_CONFIG_NAME:
        raise UsageError("--dtype", expected=f"one of {', '.join(BY_CONFIG_NAME)}", found=options.dtype)
    if options.dtype is not None and source.is_quantized and not options.dequantize:
        raise UsageError(
            "--dtype",
            expected="a source that is not quantized, or --dequantize",
            found="one with quantization_config",
            next_step="Leave --dtype out to copy codes and scales as they are.",
        )
    if options.dequantize and not source.is_quantized:
        raise UsageError("--dequantize", expected="a quantized source", found="no quantization_config in it")
    if options.mtp is not MtpChoice.KEEP and source.schema.mtp_layer is None:
        raise UsageError(f"--mtp {options.mtp}", expected="a source with an MTP layer", found="none in it")


def passthrough(source: Source, options: ConvertOptions) -> tuple[str, ...]:
    """Return the files to copy; those that describe a quantization which is gone are not among them."""
    names = passthrough_files(source.folder)
    return tuple(name for name in names if not (options.dequantize and name in (MODELOPT_FILE, CARD_FILE)))


def generated_files(
    source: Source, target: StoredLayout, options: ConvertOptions, *, is_cut: bool = False
) -> dict[str, bytes | FromRecords]:
    """Return what is copied with changes: ModelOpt's own file with its modules named as they are called now; the card.

    Args:
        source: what is converted.
        target: the layout of the result.
        options: what else changes.
        is_cut: the result is cut for ranks.
    """
    found: dict[str, bytes | FromRecords] = {}
    drops_mtp = options.mtp is MtpChoice.DROP
    if source.is_quantized and not options.dequantize and (target.layout is not source.layout or is_cut or drops_mtp):
        found |= carried_card(source, target.layout, is_cut=is_cut, drops_mtp=drops_mtp)
    if options.layout is None or MODELOPT_FILE not in passthrough(source, options):
        return found
    before = read_json(source.folder / MODELOPT_FILE)
    after = rename_modelopt(before, source.stored_layout, target)
    if after != before:
        found[MODELOPT_FILE] = json.dumps(after, indent=4, ensure_ascii=False).encode() + b"\n"
    return found


def new_config(source: Source, target: StoredLayout, options: ConvertOptions) -> dict[str, Any]:
    """Return config.json of the result: the source's where nothing that it says has changed."""
    config = dict(source.raw_config)
    if options.dtype is not None:
        set_dtype(config, options.dtype)
    if options.mtp is MtpChoice.DROP:
        drop_mtp(config)
    if options.dequantize:
        config.pop(QUANTIZATION_KEY, None)
    set_layout(config, source.stored_layout, target)
    return config
