"""A chart of one layer over the number of tokens: the computed floor, targets, and what was measured, if anything."""

from collections.abc import Iterable, Sequence
from html import escape
from math import log10
from typing import Any

from runtime.moe.cost import Device, LayerShape, floor
from runtime.moe.weights import ExpertScheme

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 430, 70, 50, 190, 50
TOKENS = tuple(1 << power for power in range(15))
LOW_US, HIGH_US = 10.0, 20000.0
# share of the floor of bf16 that is aimed at, by tokens
TARGETS = {1: 0.70, 4: 0.75, 16: 0.85, 64: 0.85, 256: 0.85, 1024: 0.75, 4096: 0.62, 16384: 0.70}
# scheme, inputs as codes, color
LINES = (
    (ExpertScheme.BF16, False, "#1f77b4"),
    (ExpertScheme.FP8_CHANNEL, True, "#d62728"),
    (ExpertScheme.INT8_CHANNEL, False, "#2ca02c"),
    (ExpertScheme.NVFP4, False, "#9467bd"),
)


def x_of(num_tokens: float) -> float:
    """Return where a number of tokens is."""
    return LEFT + (WIDTH - LEFT - RIGHT) * log10(num_tokens) / log10(TOKENS[-1])


def y_of(microseconds: float) -> float:
    """Return where a time is."""
    share = (log10(microseconds) - log10(LOW_US)) / (log10(HIGH_US) - log10(LOW_US))
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share


def text(x: float, y: float, words: str, more: str = "") -> str:
    """Return words at a place."""
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(words)}</text>'


def line(places: Iterable[tuple[float, float]], color: str, more: str = "") -> str:
    """Return a line through places."""
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2" {more}/>'


def _grid() -> list[str]:
    found = []
    for num_tokens in TOKENS[::2]:
        found.append(line(((x_of(num_tokens), TOP), (x_of(num_tokens), HEIGHT - BOTTOM)), "#e5e5e5"))
        found.append(text(x_of(num_tokens), HEIGHT - BOTTOM + 16, str(num_tokens), 'text-anchor="middle"'))
    for microseconds in (10, 100, 1000, 10000):
        found.append(line(((LEFT, y_of(microseconds)), (WIDTH - RIGHT, y_of(microseconds))), "#e5e5e5"))
        found.append(text(LEFT - 6, y_of(microseconds) + 4, str(microseconds), 'text-anchor="end"'))
    middle = (LEFT + WIDTH - RIGHT) / 2
    found.append(text(middle, HEIGHT - 14, "tokens", 'text-anchor="middle"'))
    found.append(text(16, TOP - 12, "microseconds of a layer"))
    return found


def _fastest_others(points: Sequence[dict[str, Any]]) -> list[str]:
    """Return a ring for each number of tokens: the fastest of those that are not ours, for bf16."""
    found: dict[int, float] = {}
    for row in points:
        time_us = row.get("time", {}).get("median_us")
        if time_us and row.get("beside_peers") and not row["is_ours"]:
            found[row["tokens"]] = min(time_us, found.get(row["tokens"], time_us))
    return [
        f'<circle cx="{x_of(tokens):.1f}" cy="{y_of(time_us):.1f}" r="4" fill="none" stroke="#1f77b4"/>'
        for tokens, time_us in found.items()
    ]


def roofline_svg(shape: LayerShape, device: Device, points: Sequence[dict[str, Any]] = ()) -> str:
    """Return an SVG: floors as lines, targets as crosses, the medians of our kernels as dots, others' as rings."""
    timed = [row for row in points if row.get("time", {}).get("median_us") and not row.get("beside_peers")]
    timed = [row for row in timed if row["candidate"] == "triton"]
    title = f"H {shape.hidden_size}, I {shape.intermediate_size}, {shape.num_routed} experts, {device.name}: " + (
        "measured beside the computed floor" if timed else "computed floor; nothing here is measured"
    )
    parts = [text(LEFT, 22, title, 'font-weight="bold"'), *_grid()]
    for number, (scheme, is_quantized, color) in enumerate(LINES):
        floors = [(m, floor(shape, scheme, m, is_quantized=is_quantized).floor_s(device) * 1e6) for m in TOKENS]
        parts.append(line(((x_of(m), y_of(max(us, LOW_US))) for m, us in floors), color))
        label = f"{scheme}{' w8a8' if is_quantized else ''}"
        parts.append(text(WIDTH - RIGHT + 12, TOP + 20 * number, label, f'fill="{color}"'))
        parts += [
            f'<circle cx="{x_of(row["tokens"]):.1f}" cy="{y_of(row["time"]["median_us"]):.1f}" r="3" fill="{color}"/>'
            for row in timed
            if (row["scheme"], row["inputs_as_codes"], row["routing"]) == (str(scheme), is_quantized, "uniform")
        ]
    parts += _fastest_others(points)
    for num_tokens, share in TARGETS.items():
        aimed = floor(shape, ExpertScheme.BF16, num_tokens).floor_s(device) * 1e6 / share
        parts.append(text(x_of(num_tokens), y_of(max(aimed, LOW_US)) + 4, "x", 'text-anchor="middle" fill="#1f77b4"'))
    notes = ["line: floor, computed", "x: target for bf16", "dot: measured" if timed else "dot: none measured"]
    notes += ["ring: fastest other, bf16"] if _fastest_others(points) else []
    parts += [text(WIDTH - RIGHT + 12, TOP + 100 + 20 * number, note) for number, note in enumerate(notes)]
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    style = 'font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"
