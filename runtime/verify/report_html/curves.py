"""Curves over layers, on a logarithmic scale."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from runtime.verify.report_html.svg import (
    LogScale,
    drawing,
    element,
    label,
    line,
    nice_step,
    polyline,
    rectangle,
    titled,
)

WIDTH, HEIGHT = 1080.0, 210.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 18.0, 14.0, 40.0
_SYMBOLS = {"zero": "0", "off": "\u00d7"}


@dataclass(frozen=True, slots=True)
class Curve:
    """One value a layer, None where there is none; `class_` is the look that style.css gives it."""

    name: str
    class_: str
    values: tuple[float | None, ...]
    has_points: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """A chart over layers.

    Attributes:
        title: what is read out in place of the drawing.
        layers: index of each layer.
        num_mtp: how many of the last are MTP layers.
        curves: drawn in this order, the last on top.
        tooltips: of each layer.
        marked: layer index with a line of its own, e.g. the first that is off.
    """

    title: str
    layers: tuple[int, ...]
    num_mtp: int
    curves: tuple[Curve, ...]
    tooltips: tuple[str, ...]
    marked: int | None = None


def draw(panel: Panel) -> str:
    """Return the panel as SVG."""
    values = [value for curve in panel.curves for value in curve.values]
    scale = LogScale.around(values, HEIGHT - _BOTTOM, _TOP)
    xs = _places(len(panel.layers), panel.num_mtp)
    children: list[ET.Element] = [*_grid(scale), *_layer_axis(panel, xs)]
    for curve in panel.curves:
        children += _curve(curve, xs, scale, len(panel.layers) - panel.num_mtp)
    if panel.marked in panel.layers:
        x = xs[panel.layers.index(panel.marked)]
        children += [
            line(x, _TOP, x, HEIGHT - _BOTTOM, "marked"),
            label(x + 4, _TOP + 9, f"layer {panel.marked}", class_="marked-name"),
        ]
    children += _strips(panel, xs)
    return drawing(panel.title, WIDTH, HEIGHT, children)


def _places(count: int, num_mtp: int) -> list[float]:
    """Return the x of each layer; MTP layers stand half a step apart."""
    slots = max(1.0, count - 1 + (0.8 if 0 < num_mtp < count else 0.0))
    step = min(140.0, (WIDTH - _LEFT - _RIGHT - 24) / slots)
    offsets = [index + (0.8 if index >= count - num_mtp and num_mtp < count else 0.0) for index in range(count)]
    return [_LEFT + 12 + offset * step for offset in offsets]


def _grid(scale: LogScale) -> Iterator[ET.Element]:
    for value, text in scale.ticks():
        y = scale.at(value)
        yield line(_LEFT, y, WIDTH - _RIGHT, y, "grid")
        yield label(_LEFT - 6, y + 3.5, text, "end")


def _layer_axis(panel: Panel, xs: Sequence[float]) -> Iterator[ET.Element]:
    num_main = len(panel.layers) - panel.num_mtp
    step = max(1, int(nice_step(max(1, num_main), 24)))
    for index, (layer, x) in enumerate(zip(panel.layers, xs, strict=True)):
        if index >= num_main:
            yield label(x, HEIGHT - _BOTTOM + 15, "MTP", "middle", "strong")
            if index:
                between = (x + xs[index - 1]) / 2
                yield line(between, _TOP, between, HEIGHT - _BOTTOM, "apart")
        # the label before MTP may be in its way
        elif layer % step == 0 and not (panel.num_mtp and xs[num_main] - x < 30):
            yield label(x, HEIGHT - _BOTTOM + 15, str(layer), "middle")
    yield label((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 8, "layer", "middle", "axis")


def _curve(curve: Curve, xs: Sequence[float], scale: LogScale, num_main: int) -> Iterator[ET.Element]:
    points = [
        (x, scale.at(value)) if value is not None and 0 < value < math.inf else None
        for x, value in zip(xs, curve.values, strict=True)
    ]
    # no line leads from the last layer to the MTP layer
    yield polyline([*points[:num_main], None, *points[num_main:]], f"curve {curve.class_}")
    if not curve.has_points:
        return
    radius = 2.6 if len(xs) > 40 else 3.4
    for x, value, point in zip(xs, curve.values, points, strict=True):
        if point is not None:
            yield element("circle", cx=x, cy=point[1], r=radius, class_=f"point {curve.class_}")
        elif value == 0:
            yield label(x, HEIGHT - _BOTTOM - 4, _SYMBOLS["zero"], "middle", f"zero {curve.class_}")
        elif value is not None:
            yield label(x, _TOP + 10, _SYMBOLS["off"], "middle", "off")


def _strips(panel: Panel, xs: Sequence[float]) -> Iterator[ET.Element]:
    """Yield what the pointer meets: a transparent column for each layer, with its figures."""
    step = xs[1] - xs[0] if len(xs) > 1 else 24.0
    for x, text in zip(xs, panel.tooltips, strict=True):
        yield titled(rectangle(x - step / 2, _TOP, step, HEIGHT - _BOTTOM - _TOP, "hit"), text)


def key(panel: Panel) -> list[tuple[str, str]]:
    """Return (class, words) for the legend of a panel."""
    return [(curve.class_, curve.name) for curve in panel.curves]
