"""A checkpoint that passed the gate: every tensor of its config is there, once, with the right shape and dtype."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from converters.checkpoint.dtypes import FLOAT_DTYPES
from converters.checkpoint.header import TensorEntry
from converters.checkpoint.reader import CheckpointReader
from converters.config import CONFIG_FILE, Glm4MoeConfig, read_json
from converters.errors import ConfigError, InputError
from converters.formats.declared import declared_schemes, read_quantization
from converters.formats.weights import Scheme, WeightFormat, match_scheme, plain_format
from converters.layout import Layout, Stored, StoredLayout, detect_layout, is_cache_scale
from converters.schema import ModelSchema

# where config.json of a checkpoint in another layout than the official one says so
LAYOUT_KEY = "glm4moe_layout"


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A tensor of the source's layout as it is stored: its format, and its parts by suffix."""

    stored: Stored
    format: WeightFormat
    entries: dict[str, TensorEntry]


@dataclass(frozen=True)
class Source:
    """An open checkpoint folder. Use it as a context manager; it holds file descriptors, no tensors.

    `schema` is the official one, whatever the layout; `weights` are the stored tensors by the name that each would have
    if it were not quantized.
    """

    folder: Path
    raw_config: dict[str, Any]
    config: Glm4MoeConfig
    stored_layout: StoredLayout
    reader: CheckpointReader
    quantization: dict[str, Any] | None
    weights: dict[str, StoredWeight]
    cache_scales: dict[str, str]
    """Scales of an FP8 KV cache, each with the name of the official weight it hangs on."""

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.reader.close()

    @property
    def schema(self) -> ModelSchema:
        """The official tensors that the checkpoint holds."""
        return self.stored_layout.schema

    @property
    def layout(self) -> Layout:
        """How they are stored."""
        return self.stored_layout.layout

    @property
    def is_quantized(self) -> bool:
        """Whether the checkpoint announces quantized weights."""
        return self.quantization is not None

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What was accepted although it is unusual, a sentence each."""
        notes = list(self.reader.index.notes)
        if self.config.num_nextn_predict_layers and not self.schema.has_mtp:
            notes.append("config.json announces an MTP layer, but the checkpoint has no tensor of it.")
        if not self.schema.has_router_bias:
            notes.append("No router has a correction bias; engines that ask for one need zeros.")
        code = sorted(path.name for path in self.folder.glob("*.py"))
        if code or "auto_map" in self.raw_config:
            notes.append(f"The checkpoint brings code ({', '.join(code) or 'auto_map'}); it is neither run nor copied.")
        return tuple(notes)


def open_source(folder: Path) -> Source:
    """Open a checkpoint folder in any layout and hold it against its own config.

    Raises:
        InputError: a tensor is missing, additional, or has the wrong shape or dtype; layouts are mixed.
        ConfigError: config.json is missing or not supported.
        SecurityError: see `scan_checkpoint`.
    """
    raw = read_json(folder / CONFIG_FILE)
    config = Glm4MoeConfig.from_hf(raw)
    quantization = read_quantization(raw, folder)
    schemes = declared_schemes(quantization)
    reader = CheckpointReader.open(folder)
    layout = detect_layout(config, reader.names)
    _check_announced_layout(raw, layout)
    entries, cache_scales = _group_entries(layout, reader, is_quantized=bool(schemes))
    missing = [name for name in layout.stored if not entries.get(name) or (not schemes and "" not in entries[name])]
    if missing:
        others = len(missing) - 1
        raise InputError(
            f"tensor {missing[0]}",
            expected="in the checkpoint, as its config says",
            found="none" + (f", nor {others} other{'s' if others > 1 else ''}" if others else ""),
            next_step="The checkpoint is incomplete, or its config.json is another model's.",
        )
    weights = {
        name: StoredWeight(stored, weight_format(stored, entries[name], schemes), entries[name])
        for name, stored in layout.stored.items()
    }
    return Source(folder, raw, config, layout, reader, quantization, weights, cache_scales)


def announced_layout(raw: dict[str, Any]) -> Any:
    """Return the name that config.json gives to the layout; None if it says nothing."""
    announced = raw.get(LAYOUT_KEY)
    return announced.get("name") if isinstance(announced, dict) else announced


def is_stored_as(layout: StoredLayout, name: Any) -> bool:
    """Return whether the tensors are stored as in the layout of this name."""
    # a model without any expert is stored alike in several layouts
    return name == layout.layout or layout.stored.keys() == _names_in(layout.schema, name)


def _check_announced_layout(raw: dict[str, Any], layout: StoredLayout) -> None:
    name = announced_layout(raw)
    if name is not None and not is_stored_as(layout, name):
        raise ConfigError(
            f"config.json: {LAYOUT_KEY}", expected=f"{layout.layout}, as the tensors' names show", found=repr(name)
        )


def _names_in(schema: ModelSchema, layout: Any) -> set[str]:
    return set(StoredLayout(schema, Layout(layout)).stored) if layout in set(Layout) else set()


def _group_entries(
    layout: StoredLayout, reader: CheckpointReader, *, is_quantized: bool
) -> tuple[dict[str, dict[str, TensorEntry]], dict[str, str]]:
    """Return the parts of each stored tensor by suffix, and the scales of the KV cache with their weights."""
    entries: dict[str, dict[str, TensorEntry]] = {}
    cache_scales: dict[str, str] = {}
    for name in reader.names:
        if is_cache_scale(name):
            cache_scales[name] = layout.schema.locate(name).name
            _check_cache_scale(name, reader.entry(name), layout.schema, is_quantized=is_quantized)
        else:
            stored, suffix = layout.resolve(name)
            entries.setdefault(stored.name, {})[suffix] = reader.entry(name)
    return entries, cache_scales


def _check_cache_scale(name: str, entry: TensorEntry, schema: ModelSchema, *, is_quantized: bool) -> None:
    if not is_quantized:
        raise InputError(f"tensor {name}", expected="no scale, for the checkpoint is not quantized", found="one")
    heads = schema.config.num_key_value_heads
    if entry.dtype not in FLOAT_DTYPES or entry.shape not in ((), (1,), (heads, 1, 1)):
        raise InputError(
            f"tensor {name}",
            expected=f"one float, or one for each of {heads} heads",
            found=f"{entry.dtype} {list(entry.shape)}",
        )


def weight_format(stored: Stored, entries: dict[str, TensorEntry], schemes: tuple[Scheme, ...]) -> WeightFormat:
    """Return how a tensor is stored, or refuse what its config does not declare."""
    own = entries.get("")
    is_matrix = len(stored.elements[0][0].tensor.shape) > 1
    if own is not None and own.dtype in FLOAT_DTYPES:
        if own.shape != stored.shape:
            raise InputError(
                f"tensor {stored.name}",
                expected=f"shape {list(stored.shape)}, from config.json",
                found=f"{list(own.shape)}",
            )
        if len(entries) > 1:
            scale = stored.part(next(suffix for suffix in entries if suffix))
            raise InputError(f"tensor {scale}", expected="no scale, for its weight is not quantized", found="one")
        return plain_format(own.dtype, is_matrix=is_matrix)
    if not schemes or not is_matrix:
        found = own.dtype if own is not None else f"{', '.join(entries)} only"
        raise InputError(f"tensor {stored.name}", expected=f"one of {', '.join(FLOAT_DTYPES)}", found=found)
    return match_scheme(stored.name, entries, schemes, stored.stack, (stored.rows, stored.columns))
