"""Heat maps of layers by experts. Cells of one colour are one path, so that 92 layers of 160 experts stay small."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from runtime.verify.report_html.colours import NUM_STEPS
from runtime.verify.report_html.svg import drawing, element, label, nice_step, number, rectangle, titled
from runtime.verify.report_html.words import figure, percent

_WIDTH, _LEFT, _TOP, _BELOW = 1080.0, 48.0, 20.0, 62.0
_LARGEST_CELL, _SMALLEST_HEIGHT, _LARGEST_HEIGHT = 60.0, 6.5, 22.0
# a tooltip for each cell costs about 90 bytes; with more cells only one map has them
MOST_TITLED = 4096
_MTP_GAP = 0.6
_TAIL = 0.005


@dataclass(frozen=True, slots=True)
class Ramp:
    """How a value becomes one of NUM_STEPS colours; 0 has one of its own.

    Attributes:
        key: s or d, the colour set.
        low, high: values of the first and the last colour.
        is_log: steps are equal ratios.
        words: how a value is written.
    """

    key: str
    low: float
    high: float
    is_log: bool
    words: Callable[[float], str]

    def class_of(self, value: float | None) -> str:
        """Return the class of a value: none where there is none, off where it is NaN or infinite, zero if it is 0."""
        if value is None:
            return "none"
        if not math.isfinite(value):
            return "off"
        if value == 0:
            return "zero" if self.is_log else f"{self.key}m"
        place = (value - self.low) / (self.high - self.low)
        if self.is_log:
            place = math.log(value / self.low) / math.log(self.high / self.low)
        return f"{self.key}{min(NUM_STEPS - 1, max(0, int(place * NUM_STEPS)))}"

    def at(self, place: float) -> float:
        """Return the value at a place from 0 to 1."""
        if self.is_log:
            return self.low * (self.high / self.low) ** place
        return self.low + place * (self.high - self.low)


def log_ramp(values: Sequence[float | None]) -> Ramp:
    """Return a sequential scale over most of the finite positive values, at least from half to twice their median.

    The largest and smallest of two hundred have the colours of the ends, so that one of them does not make all others
    look alike.
    """
    usable = sorted(value for value in values if value is not None and 0 < value < math.inf) or [1.0]
    median = _quantile(usable, 0.5)
    low, high = min(_quantile(usable, _TAIL), median / 2), max(_quantile(usable, 1 - _TAIL), median * 2)
    return Ramp("s", low, high, is_log=True, words=lambda value: figure(value, 2))


def share_ramp(values: Sequence[float | None]) -> Ramp:
    """Return a diverging scale, as far to both sides as most finite magnitudes, at least a percent."""
    usable = sorted(abs(value) for value in values if value is not None and math.isfinite(value)) or [0.0]
    largest = max(0.01, _quantile(usable, 1 - _TAIL))
    return Ramp("d", -largest, largest, is_log=False, words=_signed)


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[round(share * (len(ordered) - 1))]


def _signed(share: float) -> str:
    return f"{'+' if share > 0 else ''}{percent(share, 0 if abs(share) > 0.1 else 1)}"


@dataclass(frozen=True, slots=True)
class Map:
    """A heat map: rows are layers, columns experts, None where an expert has no value.

    Attributes:
        title: what is read out in place of the drawing.
        layers: index of each row.
        num_mtp: how many of the last rows are MTP layers.
        rows: values, as many in each row as there are experts.
        ramp: their colours.
        tooltip: words for row and column; None for no tooltips but those of rows.
        row_tooltips: words for each row, used where cells have none.
        outlined: cells (row, column) that are to be seen at once.
    """

    title: str
    layers: tuple[int, ...]
    num_mtp: int
    rows: tuple[tuple[float | None, ...], ...]
    ramp: Ramp
    tooltip: Callable[[int, int], str] | None
    row_tooltips: tuple[str, ...]
    outlined: tuple[tuple[int, int], ...] = ()


def draw(heat: Map) -> str:
    """Return the map as SVG, its scale below it."""
    num_experts = max(map(len, heat.rows), default=1)
    gap = _MTP_GAP if 0 < heat.num_mtp < len(heat.rows) else 0.0
    tops = [row + (gap if row >= len(heat.rows) - heat.num_mtp else 0.0) for row in range(len(heat.rows))]
    width = min(_LARGEST_CELL, (_WIDTH - _LEFT - 10) / num_experts)
    height = min(_LARGEST_HEIGHT, max(_SMALLEST_HEIGHT, width))
    bottom = _TOP + height * (len(heat.rows) + gap)
    cells = element(
        "g",
        *_cells(heat, tops),
        *_outlines(heat, tops),
        *_titles(heat, tops, num_experts),
        transform=f"translate({number(_LEFT)} {number(_TOP)}) scale({number(width)} {number(height)})",
    )
    axes = [*_rows_axis(heat, tops, height), *_columns_axis(num_experts, width)]
    return drawing(heat.title, _WIDTH, bottom + _BELOW, [cells, *axes, *_legend(heat, bottom + 16)])


def _cells(heat: Map, tops: Sequence[float]) -> Iterator[ET.Element]:
    """Yield one path for each colour; neighbours of one colour in a row are one rectangle."""
    paths: dict[str, list[str]] = {}
    for top, row in zip(tops, heat.rows, strict=True):
        colours = [heat.ramp.class_of(value) for value in row]
        begin = 0
        for end in range(1, len(colours) + 1):
            if end == len(colours) or colours[end] != colours[begin]:
                paths.setdefault(colours[begin], []).append(f"M{begin} {number(top)}h{end - begin}v1H{begin}z")
                begin = end
    for class_ in sorted(paths):
        yield element("path", d="".join(paths[class_]), class_=f"cell {class_}")


def _outlines(heat: Map, tops: Sequence[float]) -> Iterator[ET.Element]:
    marks = "".join(f"M{column} {number(tops[row])}h1v1h-1z" for row, column in heat.outlined)
    if marks:
        yield element("path", d=marks, class_="outline")


def _titles(heat: Map, tops: Sequence[float], num_experts: int) -> Iterator[ET.Element]:
    for row, top in enumerate(tops):
        if heat.tooltip is None:
            yield titled(rectangle(0, top, num_experts, 1, "hit"), heat.row_tooltips[row])
            continue
        hits = [
            titled(element("path", d=f"M{column} 0h1v1h-1z"), heat.tooltip(row, column))
            for column in range(len(heat.rows[row]))
        ]
        yield element("g", *hits, class_="hit", transform=f"translate(0 {number(top)})")


def _rows_axis(heat: Map, tops: Sequence[float], height: float) -> Iterator[ET.Element]:
    num_main = len(heat.layers) - heat.num_mtp
    step = max(1, int(nice_step(max(1, num_main), max(2, int(num_main * height / 24)))), math.ceil(11 / height))
    for row, (layer, top) in enumerate(zip(heat.layers, tops, strict=True)):
        y = _TOP + (top + 0.5) * height + 3.5
        if row >= num_main:
            yield label(_LEFT - 6, y, "MTP", "end", "strong")
        elif layer % step == 0 and not (heat.num_mtp and (tops[num_main] - top) * height < 11):
            yield label(_LEFT - 6, y, str(layer), "end")
    yield element(
        "text", text="layer", class_="axis", text_anchor="middle", transform=f"translate(11 {_TOP + 40}) rotate(-90)"
    )


def _columns_axis(num_experts: int, width: float) -> Iterator[ET.Element]:
    step = max(1, int(nice_step(num_experts, max(2, int(num_experts * width / 40)))))
    for column in range(0, num_experts, step):
        yield label(_LEFT + (column + 0.5) * width, _TOP - 6, str(column), "middle")
    yield label(_LEFT - 6, _TOP - 6, "expert", "end", "axis")


def _legend(heat: Map, top: float) -> Iterator[ET.Element]:
    """Yield the colours with their values, and beside them what stands for no value."""
    step = 22.0
    for index in range(NUM_STEPS):
        low, high = (heat.ramp.words(heat.ramp.at(edge / NUM_STEPS)) for edge in (index, index + 1))
        words = f"{low} to {high}"
        yield titled(rectangle(_LEFT + index * step, top, step, 12, f"cell {heat.ramp.key}{index}"), words)
    finite = [value for row in heat.rows for value in row if value is not None and math.isfinite(value)]
    lower = "\u2264 " if any(0 != value < heat.ramp.low for value in finite) else ""
    upper = "\u2265 " if any(value > heat.ramp.high for value in finite) else ""
    for quarter, mark in enumerate((lower, "", "", "", upper)):
        words = mark + heat.ramp.words(heat.ramp.at(quarter / 4))
        yield label(_LEFT + quarter / 4 * NUM_STEPS * step, top + 27, words, "middle" if quarter else "start")
    found = {heat.ramp.class_of(value) for row in heat.rows for value in row}
    x = _LEFT + NUM_STEPS * step + 32
    for class_, words in (("none", "no tokens"), ("zero", "zero"), ("off", "NaN or Inf")):
        if class_ in found:
            yield rectangle(x, top, 14, 12, f"cell {class_}")
            yield label(x + 20, top + 10.5, words)
            x += 110
    if heat.outlined:
        yield rectangle(x + 1, top + 1, 12, 10, "outline")
        yield label(x + 20, top + 10.5, "out of line with its siblings")
