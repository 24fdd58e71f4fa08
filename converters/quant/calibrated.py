"""What a quantization takes from calibration: scales of inputs and of the KV cache."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converters.errors import UsageError
from converters.quant.identity import described, model_digest
from converters.quant.policy import fused_groups
from converters.quant.scheme import Format, Recipe
from converters.schema import Role, Tensor
from converters.source import Source

if TYPE_CHECKING:
    from converters.quant.choice import Choice
    from converters.quant.stats import CalibrationStats

_CALIBRATE = "Run 'glm4moe calibrate {} STATS --text FILE', then add --stats STATS; or add --calibrate TEXT."
# positions of k and v in their fuse group, with what their scale is called
_CACHED = {1: "k_scale", 2: "v_scale"}


@dataclass(frozen=True)
class Calibrated:
    """Statistics that belong to the source and cover what is asked of them."""

    source: Source
    stats: "CalibrationStats"
    groups: Mapping[str, tuple[Tensor, ...]]

    @classmethod
    def of(
        cls,
        source: Source,
        stats: "CalibrationStats | None",
        choice: "Choice",
        recipes: Mapping[str, Recipe],
    ) -> "Calibrated | None":
        """Return the statistics that a choice needs; None if it needs none.

        Raises:
            UsageError: there are none, or they are of another model.
        """
        if not choice.needs_stats:
            return None
        how = _CALIBRATE.format(source.folder)
        if stats is None:
            wanted = "--kv-cache" if choice.has_kv_scales else f"--scheme {next(iter(recipes.values())).scheme}"
            raise UsageError(wanted, expected="statistics of calibration", found="none", next_step=how)
        digest, found = model_digest(source), stats.provenance.get("model_digest")
        if found != digest:
            raise UsageError(
                "--stats",
                expected=f"statistics of the model in {source.folder}, in any layout",
                found=described(found, digest),
                next_step=how,
            )
        static = {name: recipe.scheme for name, recipe in recipes.items() if recipe.info.has_input_scale}
        return cls(source, stats, fused_groups(source.schema, static))

    def input_amax(self, tensor: Tensor) -> float:
        """Return the largest input of a weight and of those that engines multiply as one with it.

        Raises:
            UsageError: calibration did not see one of them, or saw nothing but zeros.
        """
        modules = [member.module for member in self.groups[tensor.name]]
        return max(_positive(self.stats.input_amax.get(module), module) for module in modules)

    def kv_scales(self, tensor: Tensor, format_: Format) -> Iterator[tuple[str, float]]:
        """Yield name and largest magnitude of the cache scale that hangs on a weight: on those of k and v, none else.

        The MTP layer has none: vLLM's loader of that layer takes such a tensor for an error.
        """
        layer, fuse = tensor.layer, tensor.spec.fuse
        if layer is None or layer == self.source.schema.mtp_layer or tensor.spec.role is not Role.ATTENTION:
            return
        if fuse is None or fuse.position not in _CACHED:
            return
        suffix = _CACHED[fuse.position]
        known = self.stats.key_amax if suffix == "k_scale" else self.stats.value_amax
        above = tensor.module if format_ is Format.MODELOPT else tensor.module.rpartition(".")[0]
        yield f"{above}.{suffix}", _positive(known.get(layer), f"{above}.{suffix}")


def _positive(value: float | None, name: str) -> float:
    if value is not None and value > 0 and math.isfinite(value):
        return value
    raise UsageError(
        f"--stats: {name}",
        expected="the largest magnitude that calibration saw, above zero",
        found="nothing" if value is None else str(value),
        next_step="Calibrate on more text, or leave the module out with --ignore, or the MTP layer with --mtp keep.",
    )
