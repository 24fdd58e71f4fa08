"""The histogram of the KL of tokens, and its mean by the reference's confidence."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from runtime.verify.report_html.svg import (
    LinearScale,
    LogScale,
    drawing,
    label,
    line,
    rectangle,
    titled,
)
from runtime.verify.report_html.words import figure, grouped, percent

WIDTH, HEIGHT = 1080.0, 270.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 18.0, 44.0, 40.0
BINS_PER_DECADE = 4
# of an fp32 log-softmax nothing smaller can be told from rounding
SMALLEST_NATS = 1e-9
_MOST_DECADES = 12


@dataclass(frozen=True, slots=True)
class Bin:
    """Number of tokens with low <= KL < high, nats; a first bin from 0 also holds what rounding made negative."""

    low: float
    high: float
    count: int


def log_bins(values: Sequence[float]) -> list[Bin]:
    """Return a histogram over equal ratios of finite values, BINS_PER_DECADE to a factor of ten."""
    largest = max((value for value in values if value < math.inf), default=0.0)
    top = math.ceil(math.log10(max(largest, 10 * SMALLEST_NATS)) + 1e-12)
    used = [value for value in values if value >= SMALLEST_NATS]
    bottom = math.floor(math.log10(min(used, default=SMALLEST_NATS)))
    if len(used) < len(values):
        bottom = max(bottom - 1, round(math.log10(SMALLEST_NATS)) - 1)
    bottom = max(min(bottom, top - 1), top - _MOST_DECADES)
    edges = [10 ** (bottom + index / BINS_PER_DECADE) for index in range((top - bottom) * BINS_PER_DECADE + 1)]
    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[_bin_of(value, bottom, len(counts))] += 1
    if any(value < edges[0] for value in values):
        edges[0] = 0.0
    return [Bin(*pair) for pair in zip(edges[:-1], edges[1:], counts, strict=True)]


def _bin_of(value: float, bottom: int, count: int) -> int:
    if value <= 0:
        return 0
    return min(count - 1, max(0, math.floor((math.log10(value) - bottom) * BINS_PER_DECADE)))


def draw_histogram(bins: Sequence[Bin], marks: Sequence[tuple[str, float]]) -> str:
    """Return the histogram as SVG; marks are (name, nats), drawn as lines with their names above."""
    first = bins[0].high / 10 ** (1 / BINS_PER_DECADE)
    xs = LogScale(first, bins[-1].high, _LEFT, WIDTH - _RIGHT)
    ys = LinearScale.up_to(max(item.count for item in bins), HEIGHT - _BOTTOM, _TOP)
    children: list[ET.Element] = []
    for value, text in ys.ticks():
        children += [line(_LEFT, ys.at(value), WIDTH - _RIGHT, ys.at(value), "grid")]
        children += [label(_LEFT - 6, ys.at(value) + 3.5, text, "end")]
    for index, (value, text) in enumerate(xs.ticks()):
        words = f"\u2264 {figure(bins[0].high, 2)}" if index == 0 and not bins[0].low else text
        children += [label(xs.at(value), HEIGHT - _BOTTOM + 16, words, "middle")]
    total = max(1, sum(item.count for item in bins))
    for item in bins:
        x, y = xs.at(item.low or first), ys.at(item.count)
        low = f"{figure(item.low)} to" if item.low else "up to"
        words = f"{low} {figure(item.high)} nats: {grouped(item.count)} tokens, {percent(item.count / total)}"
        # an empty bin has no height that a pointer could meet
        bar = rectangle(x + 0.5, y, xs.at(item.high) - x - 1, HEIGHT - _BOTTOM - y, "bar")
        children += [titled(bar, words)] if item.count else []
    children += _marks(marks, xs)
    children += [label(WIDTH / 2, HEIGHT - 8, "KL of a token, nats", "middle", "axis")]
    return drawing("Histogram of the KL divergence of tokens, logarithmic bins", WIDTH, HEIGHT, children)


def _marks(marks: Sequence[tuple[str, float]], xs: LogScale) -> Iterator[ET.Element]:
    taken = [-math.inf, -math.inf, -math.inf]
    for name, value in sorted(marks, key=lambda mark: mark[1]):
        x = xs.at(value)
        words = f"{name} {figure(value)}"
        half = len(words) * 3.4
        middle = min(max(x, _LEFT + half), WIDTH - _RIGHT - half)
        level = next((index for index, end in enumerate(taken) if middle - half > end), len(taken) - 1)
        taken[level] = middle + half
        y = 11.0 + 12 * level
        yield line(x, y + 3, x, HEIGHT - _BOTTOM, "mark")
        yield label(middle, y, words, "middle", "mark-name")


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tokens whose most likely next token had a probability within `name`."""

    name: str
    count: int
    mean: float | None


def draw_buckets(buckets: Sequence[Bucket]) -> str:
    """Return the mean KL of each bucket as horizontal bars."""
    row, left, right = 30.0, 150.0, 210.0
    means = [bucket.mean for bucket in buckets if bucket.mean is not None and math.isfinite(bucket.mean)]
    xs = LinearScale.up_to(max(means, default=0.0), left, WIDTH - right)
    bottom = 8 + row * len(buckets)
    children: list[ET.Element] = []
    for value, text in xs.ticks():
        children += [line(xs.at(value), 6, xs.at(value), bottom, "grid")]
        children += [label(xs.at(value), bottom + 16, text, "middle")]
    for index, bucket in enumerate(buckets):
        y = 8 + row * index
        children += [label(left - 8, y + 18, bucket.name, "end")]
        children += _bucket(bucket, y, row, xs)
    children += [label((left + WIDTH - right) / 2, bottom + 32, "mean KL, nats", "middle", "axis")]
    return drawing("Mean KL by the reference's confidence", WIDTH, bottom + 38, children)


def _bucket(bucket: Bucket, y: float, row: float, xs: LinearScale) -> Iterator[ET.Element]:
    if bucket.mean is None:
        yield label(xs.begin + 6, y + 18, "no tokens", class_="axis")
        return
    end = xs.at(bucket.mean)
    words = f"{figure(bucket.mean)} nats, {grouped(bucket.count)} tokens"
    yield titled(rectangle(xs.begin, y + 5, end - xs.begin, row - 10, "bar"), f"{bucket.name}: {words}")
    yield label(end + 8, y + 18, words)
