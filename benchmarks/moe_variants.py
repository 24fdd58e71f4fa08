"""Tiles around those that our kernels choose: one thing changed at a time, and what a GPU has no room for."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from runtime.kernels.moe.configs import HOPPER, SHARED_MEMORY_BYTES, WIDE_ROWS, TileConfig, Tiles, choose
from runtime.moe.cost import LayerShape
from runtime.moe.dispatcher import Slots
from runtime.moe.experts import LocalExperts
from runtime.moe.fused import FusedExperts
from runtime.moe.weights import ExpertScheme

WIDTHS, WARPS = (64, 128, 256), (4, 8)
# rows per expert of every form that `choose` knows, in their order
FORM_ROWS = (0.2, 1.0, 16.0, 32.0, WIDE_ROWS, 128.0)
# of tokens that can lie on the wide side of a matrix unit
_WIDE_BLOCK_M = 64
UP, DOWN, BOTH = "up", "down", "both"


@dataclass(frozen=True, slots=True)
class FixedTiles(FusedExperts):
    """Fused experts with tiles that are given."""

    tiles: Tiles | None = None

    def _tiles(self, hidden_TD: torch.Tensor, slots: Slots, experts: LocalExperts) -> Tiles:
        assert self.tiles is not None
        return self.tiles


@dataclass(frozen=True, slots=True)
class Variant:
    """Tiles that differ from the chosen ones.

    Args:
        op: "up", "down" or "both": which product; "" for the chosen tiles themselves.
        change: how they differ.
        tiles: all of them.
    """

    op: str
    change: str
    tiles: Tiles


def tiles_of(
    shape: LayerShape,
    scheme: ExpertScheme,
    num_tokens: int,
    *,
    is_quantized: bool,
    is_batch_invariant: bool = False,
) -> Tiles:
    """Return the tiles that are chosen for a layer on Hopper."""
    return _chosen(
        shape, scheme, rows_per_expert(shape, num_tokens),
        is_quantized=is_quantized, is_batch_invariant=is_batch_invariant,
    )  # fmt: skip


def rows_per_expert(shape: LayerShape, num_tokens: int) -> float:
    """Return rows of a routed expert with uniform routing."""
    return num_tokens * shape.num_chosen / shape.num_routed


def _chosen(
    shape: LayerShape, scheme: ExpertScheme, rows: float, *, is_quantized: bool, is_batch_invariant: bool = False
) -> Tiles:
    sizes = {"hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size}
    return choose(scheme, HOPPER, rows, **sizes, is_quantized=is_quantized, batch_invariant=is_batch_invariant)


def variants(shape: LayerShape, scheme: ExpertScheme, num_tokens: int, *, is_quantized: bool) -> list[Variant]:
    """Return the chosen tiles, and those around them, each once: of up, of down, and the forms on either side."""
    base = tiles_of(shape, scheme, num_tokens, is_quantized=is_quantized)
    found = {base: Variant("", "", base)}
    if not base.is_gemv:
        for op in (UP, DOWN):
            for config in _around(getattr(base, op)):
                found.setdefault(tiles := replace(base, **{op: config}), _variant(op, base, tiles))
    for tiles in _forms(shape, scheme, base, is_quantized=is_quantized):
        found.setdefault(tiles, _variant(BOTH, base, tiles))
    return list(found.values())


def _variant(op: str, base: Tiles, tiles: Tiles) -> Variant:
    return Variant(op, ", ".join(changes(base, tiles)), tiles)


def _around(config: TileConfig) -> Iterator[TileConfig]:
    yield from (replace(config, block_n=width) for width in WIDTHS)
    yield from (replace(config, num_warps=warps) for warps in WARPS)
    yield from (replace(config, num_stages=config.num_stages + step) for step in (-1, 1))
    yield replace(config, persistent=not config.persistent)


def _forms(shape: LayerShape, scheme: ExpertScheme, base: Tiles, *, is_quantized: bool) -> Iterator[Tiles]:
    """Yield what is chosen for some more and for fewer rows, and the same with the other operand on the left."""
    forms = [_chosen(shape, scheme, rows, is_quantized=is_quantized) for rows in FORM_ROWS]
    forms = list(dict.fromkeys(forms))
    place = forms.index(base)
    yield from forms[max(0, place - 1) : place + 2]
    can_swap = scheme.is_plain or (is_quantized and scheme is not ExpertScheme.NVFP4)
    if can_swap and base.block_m >= _WIDE_BLOCK_M:
        swapped = (replace(config, swap_ab=not config.swap_ab) for config in (base.up, base.down))
        yield Tiles(*swapped)


def changes(old: Tiles, new: Tiles) -> list[str]:
    """Return in words what is not the same."""
    before, after = _flat(old), _flat(new)
    # tiles do not matter to a GEMV
    names = [name for name in before if not (old.is_gemv or new.is_gemv) or name == "is_gemv"]
    return [f"{name} {before[name]} -> {after[name]}" for name in names if before[name] != after[name]]


def _flat(tiles: Tiles) -> dict[str, Any]:
    parts = {f"{op}.{name}": value for op in (UP, DOWN) for name, value in asdict(getattr(tiles, op)).items()}
    return parts | {"is_gemv": tiles.is_gemv}


def least_shared_bytes(scheme: ExpertScheme, config: TileConfig, *, is_quantized: bool) -> int:
    """Return the shared memory that triton takes on Hopper at least: steps that are loaded ahead.

    A matrix unit reads operands there, so that all steps are there at a time; weights that are widened go through
    registers, and take one step less. Scales come on top.
    """
    bits = 4 if scheme is ExpertScheme.NVFP4 else 8 * scheme.code_dtype.itemsize
    is_widened = not (scheme.is_plain or is_quantized)
    inputs = config.num_stages * config.block_m * (16 if is_widened else bits)
    weights = (config.num_stages - is_widened) * config.block_n * bits
    return config.block_k * (inputs + weights) // 8


def refusal(scheme: ExpertScheme, tiles: Tiles, *, is_quantized: bool) -> str:
    """Return why tiles cannot run on Hopper, as far as that is known before they are compiled; "" if nothing is."""
    if tiles.is_gemv:
        return ""
    for op in (UP, DOWN):
        config = getattr(tiles, op)
        least = least_shared_bytes(scheme, config, is_quantized=is_quantized)
        if least > SHARED_MEMORY_BYTES:
            return f"{op}: {least} bytes of shared memory, of {SHARED_MEMORY_BYTES}"
    return ""
