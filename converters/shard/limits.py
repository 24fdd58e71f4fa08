"""Which sizes of a mapping a model and its storage formats allow; what does not fit is refused with the way round."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import lcm

from converters.config import Glm4MoeConfig
from converters.errors import UsageError
from converters.formats.weights import Use
from converters.inspect.parallel import SIZES, cut_reason
from converters.layout import Layout, Stored
from converters.schema import Role
from converters.shard.mapping import ParallelMapping, SharedExperts
from converters.shard.units import SliceUnits

_VOCABULARY = (Role.EMBEDDING, Role.HEAD, Role.MTP_EMBEDDING, Role.MTP_HEAD)
# option, way round, and what to show as its size where it is not the number of slices
_TP: tuple[str, str, int | None] = ("--tp", "choose another --tp", None)


@dataclass(frozen=True, slots=True)
class Limit:
    """One row of the table: a part of the model that is cut, and the sizes that divide it.

    Attributes:
        option: the size that was asked for, as in `--tp 8`.
        unit: rows or columns that share a scale or a word and stay together; 1 if there are none.
        reason: why it does not fit; empty if it does.
        sizes: those of `SIZES` that fit.
        way_round: what else would work.
    """

    part: str
    width: int
    unit: int
    option: str
    reason: str
    sizes: tuple[int, ...]
    way_round: str = ""


class MappingRefused(UsageError):
    """Sizes that do not fit the model; `limits` has every part with the sizes that do."""

    def __init__(self, limits: tuple[Limit, ...]) -> None:
        self.limits = limits
        first = next(limit for limit in limits if limit.reason)
        others = sum(bool(limit.reason) for limit in limits) - 1
        more = f", and {others} more" if others else ""
        sizes = ", ".join(map(str, first.sizes)) or "none"
        super().__init__(
            f"{first.option}: {first.part}",
            expected=f"a size that fits: {sizes}",
            found=f"{first.reason}{more}",
            next_step=f"{first.way_round[0].upper()}{first.way_round[1:]}." if first.way_round else "",
        )


def check_mapping(
    planner: SliceUnits, wholes: Iterable[Stored], mapping: ParallelMapping, layout: Layout
) -> tuple[Limit, ...]:
    """Return the table of limits, all of them kept.

    Raises:
        MappingRefused: a size does not fit.
        UsageError: a choice that the layout does not have.
    """
    if layout is Layout.FUSED_SHARED and mapping.shared_experts is SharedExperts.REPLICATE and mapping.moe_tp > 1:
        raise UsageError(
            f"--shared-experts {mapping.shared_experts}",
            expected="a slot cut as the experts that it lies among",
            found=f"layout {layout} with experts cut over {mapping.moe_tp} ranks",
            next_step=f"Use --ep {mapping.tp}, which leaves experts and slots whole, or --layout split.",
        )
    limits = mapping_limits(planner.source.config, units_of_parts(planner, wholes), mapping, layout)
    if any(limit.reason for limit in limits):
        raise MappingRefused(limits)
    return limits


def units_of_parts(planner: SliceUnits, wholes: Iterable[Stored]) -> dict[Role, int]:
    """Return, for each role, how many rows or columns stay together along the dims that are cut."""
    units: dict[Role, int] = {}
    for whole in wholes:
        specs = {piece.tensor.spec for piece in whole.elements[0]}
        for spec in specs:
            if spec.tp_dim is not None:
                grains = [part.grain[spec.tp_dim] for part in planner.parts(whole) if part.use is not Use.SHAPE]
                units[spec.role] = lcm(units.get(spec.role, 1), *(grain for grain in grains if grain))
    return units


def mapping_limits(
    config: Glm4MoeConfig, units: dict[Role, int], mapping: ParallelMapping, layout: Layout
) -> tuple[Limit, ...]:
    """Return a row for every part that the mapping cuts.

    Args:
        config: the model.
        units: see `units_of_parts`.
        mapping: what is asked for.
        layout: of what is cut: a slot of a fused shared expert is cut as the routed experts are.
    """
    return (
        *_attention_limits(config, units, mapping),
        *_mlp_limits(config, units, mapping, layout),
        _limit("vocabulary", config.vocab_size, lcm(*(units.get(role, 1) for role in _VOCABULARY)), mapping.tp, _TP),
        _ep_limit(config, mapping),
        _pp_limit(config, mapping),
    )


def _limit(part: str, width: int, unit: int, size: int, rounds: tuple[str, str, int | None]) -> Limit:
    option, way_round, asked = rounds
    if unit > 1:
        way_round += "; or quantize this part per channel, or not at all"
    sizes = tuple(n for n in SIZES if not _reason(width, unit, n))
    shown = f"{option} {size if asked is None else asked}"
    return Limit(part, width, unit, shown, _reason(width, unit, size), sizes, way_round)


def _attention_limits(config: Glm4MoeConfig, units: dict[Role, int], mapping: ParallelMapping) -> Iterator[Limit]:
    heads, kv_heads, unit = config.num_attention_heads, config.num_key_value_heads, units.get(Role.ATTENTION, 1)
    yield _limit("attention heads", heads, 1, mapping.tp, _TP)
    is_even = kv_heads % mapping.tp == 0 or mapping.tp % kv_heads == 0
    reason = "" if is_even else f"{kv_heads} heads neither divide by {mapping.tp} nor repeat evenly over it"
    sizes = tuple(n for n in SIZES if kv_heads % n == 0 or n % kv_heads == 0)
    yield Limit("key-value heads", kv_heads, 1, f"--tp {mapping.tp}", reason, sizes, _TP[1])
    if heads % mapping.tp == 0 and is_even:
        yield _limit("query rows, output columns", config.q_size, unit, mapping.tp, _TP)
        size = min(mapping.tp, kv_heads)
        yield _limit("key and value rows", config.kv_size, unit, size, (*_TP[:2], mapping.tp))


def _mlp_limits(
    config: Glm4MoeConfig, units: dict[Role, int], mapping: ParallelMapping, layout: Layout
) -> Iterator[Limit]:
    if config.first_k_dense_replace:
        unit = units.get(Role.DENSE_MLP, 1)
        yield _limit("dense layers", config.intermediate_size, unit, mapping.tp, _TP)
    unit, width = units.get(Role.EXPERT, 1), config.moe_intermediate_size
    is_slot = layout is Layout.FUSED_SHARED
    if is_slot:
        unit = lcm(unit, units.get(Role.SHARED_EXPERT, 1))
    fitting = [
        ep
        for ep in range(2, mapping.tp + 1)
        if mapping.tp % ep == 0 and config.n_routed_experts % ep == 0 and not _reason(width, unit, mapping.tp // ep)
    ]
    eps = ", ".join(map(str, fitting))
    around = f"use --ep {eps}, which cuts experts less or not at all" if fitting else _TP[1]
    part = "experts, and the slots among them" if is_slot else "experts"
    yield _limit(part, width, unit, mapping.moe_tp, ("--tp / --ep =", around, None))
    if not is_slot and mapping.shared_experts is SharedExperts.SPLIT:
        around = f"use --shared-experts replicate, or {_TP[1]}"
        width, unit = config.shared_intermediate_size, units.get(Role.SHARED_EXPERT, 1)
        yield _limit("shared expert", width, unit, mapping.tp, ("--tp", around, None))


def _ep_limit(config: Glm4MoeConfig, mapping: ParallelMapping) -> Limit:
    experts, redundant, ep = config.n_routed_experts, mapping.redundant_experts, mapping.ep
    if redundant > experts:
        reason = f"{redundant} redundant experts are more than the {experts} there are"
        fitting = tuple(n for n in (0, *SIZES) if n <= experts and (experts + n) % ep == 0)
        return Limit("redundant experts", redundant, 1, f"--redundant-experts {redundant}", reason, fitting)
    slots = experts + redundant
    needed = redundant + -slots % ep
    around = f"add --redundant-experts {needed}, or choose another --ep" if needed <= experts else "choose another --ep"
    reason = f"{slots} experts do not divide by {ep}" if slots % ep else ""
    sizes = tuple(n for n in SIZES if slots % n == 0)
    return Limit("expert slots", slots, 1, f"--ep {ep}", reason, sizes, around)


def _pp_limit(config: Glm4MoeConfig, mapping: ParallelMapping) -> Limit:
    layers = config.num_hidden_layers
    reason = "" if mapping.pp <= layers else f"{layers} layers are fewer than {mapping.pp} stages"
    sizes = tuple(n for n in SIZES if n <= layers)
    return Limit("layers", layers, 1, f"--pp {mapping.pp}", reason, sizes, "choose fewer stages")


def _reason(width: int, unit: int, size: int) -> str:
    """Return why a width cannot be cut; whole, it may have a part of a group."""
    return "" if size == 1 else cut_reason(width, unit, size)
