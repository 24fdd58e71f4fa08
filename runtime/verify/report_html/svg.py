"""Small functions that build SVG, and the scales that place things in it. Units are those of the drawing."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from runtime.verify.report_html.words import figure, visible

# decades of a logarithmic axis; what is smaller sits on its lower end
_MOST_DECADES = 9


def element(tag: str, *children: ET.Element, text: str = "", **attributes: str | float) -> ET.Element:
    """Return an element; `_` in the name of an attribute stands for `-`, `class_` for `class`."""
    made = ET.Element(tag)
    for name, value in attributes.items():
        made.set(name.rstrip("_").replace("_", "-"), value if isinstance(value, str) else number(value))
    made.text = visible(text) or None
    made.extend(children)
    return made


def number(value: float) -> str:
    """Return a coordinate: at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value % 1 else str(int(value))


def drawing(label: str, width: float, height: float, children: Iterable[ET.Element]) -> str:
    """Return an SVG document as text; the label is what is read out in its place."""
    box = f"0 0 {number(width)} {number(height)}"
    # where a page of paper is too low for its height it stays under its caption, at the left
    place, name = "xMinYMin", visible(label)
    root = element(
        "svg",
        *children,
        viewBox=box,
        preserveAspectRatio=place,
        width=width,
        height=height,
        role="img",
        aria_label=name,
    )
    return ET.tostring(root, encoding="unicode")


def titled(shape: ET.Element, title: str) -> ET.Element:
    """Return the shape with a tooltip."""
    shape.insert(0, element("title", text=title))
    return shape


def label(x: float, y: float, text: str, anchor: str = "start", class_: str = "") -> ET.Element:
    """Return a line of text; `anchor` is start, middle or end."""
    made = element("text", text=text, x=x, y=y)
    if anchor != "start":
        made.set("text-anchor", anchor)
    if class_:
        made.set("class", class_)
    return made


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> ET.Element:
    """Return a straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def rectangle(x: float, y: float, width: float, height: float, class_: str) -> ET.Element:
    """Return a rectangle."""
    return element("rect", x=x, y=y, width=width, height=height, class_=class_)


def polyline(points: Sequence[tuple[float, float] | None], class_: str) -> ET.Element:
    """Return a path through the points, interrupted at each None; a point alone is drawn as a short dash."""
    parts: list[str] = []
    is_down = False
    for index, point in enumerate(points):
        if point is None:
            is_down = False
            continue
        x, y = point
        alone = not is_down and (index + 1 == len(points) or points[index + 1] is None)
        parts.append(
            f"M{number(x - 5)} {number(y)}h10" if alone else f"{'L' if is_down else 'M'}{number(x)} {number(y)}"
        )
        is_down = True
    return element("path", d="".join(parts), class_=class_)


@dataclass(frozen=True, slots=True)
class LogScale:
    """Positive values in [low, high] to [begin, end]; what lies outside is put on the nearer end."""

    low: float
    high: float
    begin: float
    end: float

    @classmethod
    def around(cls, values: Iterable[float | None], begin: float, end: float) -> "LogScale":
        """Return the scale whose ends are the powers of ten around all finite positive values."""
        usable = [value for value in values if value is not None and 0 < value < math.inf]
        high = math.ceil(math.log10(max(usable, default=1.0)) - 1e-9)
        low = math.floor(math.log10(min(usable, default=0.1)) + 1e-9)
        return cls(10.0 ** max(min(low, high - 1), high - _MOST_DECADES), 10.0**high, begin, end)

    def at(self, value: float) -> float:
        """Return where a value is drawn."""
        value = min(max(value, self.low), self.high)
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> list[tuple[float, str]]:
        """Return values with their labels: powers of ten, and between them where there are few."""
        first, last = round(math.log10(self.low)), round(math.log10(self.high))
        factors = (1, 2, 5) if last - first <= 1 else (1, 3) if last - first == 2 else (1,)
        values = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        return [(value, figure(value)) for value in values if value <= self.high * 1.0001]


@dataclass(frozen=True, slots=True)
class LinearScale:
    """Values in [0, high] to [begin, end]."""

    high: float
    begin: float
    end: float

    @classmethod
    def up_to(cls, largest: float, begin: float, end: float) -> "LinearScale":
        """Return the scale that ends at the next round number."""
        step = nice_step(largest, 5)
        return cls(max(step, math.ceil(largest / step - 1e-9) * step), begin, end)

    def at(self, value: float) -> float:
        """Return where a value is drawn."""
        return self.begin + min(max(value / self.high, 0.0), 1.0) * (self.end - self.begin)

    def ticks(self) -> list[tuple[float, str]]:
        """Return round values with their labels."""
        step = nice_step(self.high, 5)
        return [(index * step, figure(index * step)) for index in range(round(self.high / step) + 1)]


def nice_step(span: float, most: int) -> float:
    """Return 1, 2 or 5 times a power of ten that divides a span into at most so many steps."""
    if not 0 < span < math.inf:
        return 1.0
    raw = span / most
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
