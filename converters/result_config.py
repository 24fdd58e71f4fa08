"""config.json of a conversion's result: what the options changed, and nothing else."""

from collections.abc import Iterable, Mapping
from typing import Any

from converters.config import Glm4MoeConfig
from converters.formats.declared import QUANTIZATION_KEY
from converters.layout import Layout, Stored, StoredLayout
from converters.source import LAYOUT_KEY

# lists of module names in the dialects of quantization_config
_MODULE_LISTS = ("ignore", "modules_to_not_convert", "exclude_modules")
_WEIGHT_SUFFIX = ".weight"


def set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Name the dtype, by the keys that the config has."""
    for key in [key for key in ("torch_dtype", "dtype") if key in config] or ["dtype"]:
        config[key] = dtype


def drop_mtp(config: dict[str, Any]) -> None:
    """Announce no MTP layer, by the keys that the config has."""
    for key in ("num_nextn_predict_layers", "num_mtp_layers"):
        if key in config:
            config[key] = 0


def set_layout(config: dict[str, Any], before: StoredLayout, after: StoredLayout) -> None:
    """Say how the tensors are stored, and name quantized modules as they are called now."""
    config.pop(LAYOUT_KEY, None)
    if after.layout is not Layout.SPLIT:
        config[LAYOUT_KEY] = layout_block(after.layout, after.schema.config)
    if before.layout is not after.layout and isinstance(config.get(QUANTIZATION_KEY), dict):
        config[QUANTIZATION_KEY] = _renamed(config[QUANTIZATION_KEY], module_names(before, after))


def rename_modelopt(content: dict[str, Any], before: StoredLayout, after: StoredLayout) -> dict[str, Any]:
    """Return the content of ModelOpt's own file with quantized modules named as they are called now."""
    block = content.get("quantization")
    if before.layout is after.layout or not isinstance(block, dict):
        return content
    return {**content, "quantization": _renamed(block, module_names(before, after))}


def layout_block(layout: Layout, model: Glm4MoeConfig) -> dict[str, Any]:
    """Return what config.json says about a layout.

    A shared expert's slot has a constant weight. Where the routed weights carry routed_scaling_factor it is 1; an
    engine that multiplies the combined output instead needs its reciprocal, for the shared expert is never scaled.
    """
    block: dict[str, Any] = {"name": str(layout)}
    if layout is Layout.FUSED_SHARED:
        first = model.n_routed_experts
        block["shared_expert_slots"] = list(range(first, first + model.n_shared_experts))
        block["shared_slot_weight"] = {
            "routed_weights_scaled": 1.0,
            "output_scaled": 1.0 / model.routed_scaling_factor,
        }
    return block


def module_names(before: StoredLayout, after: StoredLayout) -> dict[str, tuple[str, ...]]:
    """Return what each module and tensor of one layout is called in another."""
    renamed: dict[str, dict[str, None]] = {}
    for stored in before.stored.values():
        tensors = [piece.tensor for pieces in stored.elements for piece in pieces]
        homes = [place.stored for tensor in tensors for place in after.places(tensor)]
        renamed.setdefault(_module(stored), {}).update(dict.fromkeys(_module(home) for home in homes))
        # a packed stack is named like a module, and means one
        if stored.name != _module(stored):
            renamed.setdefault(stored.name, {}).update(dict.fromkeys(home.name for home in homes))
    return {name: tuple(names) for name, names in renamed.items()}


def _module(stored: Stored) -> str:
    return stored.name.removesuffix(_WEIGHT_SUFFIX)


def _renamed(block: Mapping[str, Any], names: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Return quantization_config with the exact names in its module lists replaced; patterns stay as they are."""
    return {
        key: _rename_all(value, names) if key in _MODULE_LISTS and isinstance(value, list) else value
        for key, value in block.items()
    }


def _rename_all(entries: Iterable[Any], names: Mapping[str, tuple[str, ...]]) -> list[Any]:
    return list(dict.fromkeys(new for entry in entries for new in names.get(str(entry), (entry,))))
