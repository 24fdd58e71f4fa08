"""Which layer, expert or tensor is off beside those that should be like it."""

import statistics
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.verify.limits import INDISTINGUISHABLE

if TYPE_CHECKING:
    from converters.quant.certificate import Certificate
    from runtime.verify.results import LayerDifference

MIN_Z = 6.0
MIN_RATIO = 1.5
# the median of fewer says nothing
MIN_SIBLINGS = 5
# an expert that saw fewer tokens has an error of its own, by chance
MIN_EXPERT_TOKENS = 8
# what parts of a layer are called; its second half without and with experts
ATTENTION, NORM, MLP_NAMES = "attention", "norm before the MLP", ("MLP", "MoE")
# scales a median absolute deviation to the standard deviation of a normal distribution
_MAD_TO_SIGMA = 1.4826


@dataclass(frozen=True, slots=True)
class Outlier:
    """A value far above those of its siblings.

    Attributes:
        subject: which layer, expert or tensor.
        value: its relative error.
        median: of the siblings, its own included.
        z: (value - median) / (1.4826 * median absolute deviation); infinite where the siblings are all equal.
    """

    subject: str
    value: float
    median: float
    z: float

    def __str__(self) -> str:
        """Return the one-line message."""
        return f"{self.subject}: relative error {self.value:.4g}, {self.value / self.median:.2g} times its siblings'"


def outliers(values: Mapping[str, float]) -> tuple[Outlier, ...]:
    """Return those of positive errors that exceed MIN_RATIO * median with a robust z above MIN_Z, worst first.

    Errors of 0 are not siblings: what was left as it was says nothing about what was rounded. Neither are NaN and
    infinity, which fail on their own.
    """
    kept = {name: value for name, value in values.items() if 0 < value < float("inf")}
    if len(kept) < MIN_SIBLINGS:
        return ()
    median = statistics.median(kept.values())
    sigma = _MAD_TO_SIGMA * statistics.median(abs(value - median) for value in kept.values())
    found = []
    for name, value in kept.items():
        z = (value - median) / sigma if sigma else float("inf")
        if value > MIN_RATIO * median and z > MIN_Z:
            found.append(Outlier(name, value, median, z))
    return tuple(sorted(found, key=lambda outlier: -outlier.value / outlier.median))


def layer_outliers(layers: "Iterable[LayerDifference]") -> tuple[Outlier, ...]:
    """Return layers beside all others and experts beside those of their layer; the MTP layer has no siblings.

    What cannot be told from the floor is left out: rounding differs from layer to layer.
    """
    layers = tuple(layers)
    groups: dict[Hashable, dict[str, float]] = {}
    for found in layers:
        for part, error in ((ATTENTION, found.attention), (mlp_name(found), found.mlp)):
            if not found.is_mtp and not _is_noise(error.relative, error.floor_relative):
                groups.setdefault(part, {})[f"{layer_name(found)} {part}"] = error.relative
        for expert in found.experts:
            if expert.relative is None or expert.num_tokens < MIN_EXPERT_TOKENS:
                continue
            if not _is_noise(expert.relative, found.mlp.floor_relative):
                groups.setdefault(found.layer, {})[expert_name(found, expert.expert)] = expert.relative
    return tuple(outlier for group in groups.values() for outlier in outliers(group))


def _is_noise(relative: float, floor: float | None) -> bool:
    return floor is not None and relative < INDISTINGUISHABLE * floor


def tensor_outliers(weights: "Certificate") -> tuple[Outlier, ...]:
    """Return rounded tensors beside those of the same name in other layers, experts beside those of their layer."""
    groups: dict[Hashable, dict[str, float]] = {}
    for figures in weights.tensors:
        groups.setdefault((figures.scheme, figures.relation, _family(figures.tensor)), {})[
            f"tensor {figures.tensor}"
        ] = figures.relative_error
    return tuple(outlier for group in groups.values() for outlier in outliers(group))


def layer_name(found: "LayerDifference") -> str:
    """Return what a reader calls the layer."""
    return f"MTP layer {found.layer}" if found.is_mtp else f"layer {found.layer}"


def expert_name(found: "LayerDifference", expert: int) -> str:
    """Return what a reader calls an expert of the layer."""
    return f"{layer_name(found)} expert {expert}"


def mlp_name(found: "LayerDifference") -> str:
    """Return what its second half is."""
    return MLP_NAMES[found.router is not None]


def _family(tensor: str) -> str:
    """Return the name with its last index left open: that of the expert, or else that of the layer."""
    parts = tensor.split(".")
    last = max((index for index, part in enumerate(parts) if part.isdigit()), default=None)
    return tensor if last is None else ".".join([*parts[:last], "*", *parts[last + 1 :]])
