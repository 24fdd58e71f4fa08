"""Planted faults as the level `layers` alone sees them: by what each layer computes, without a look at any weight."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from converters.compare import compare_structure
from runtime.streaming.options import LAYERS, StreamOptions
from runtime.verify.limits import PROFILES
from runtime.verify.report import Levels, VerifyReport, build_report
from runtime.verify.streamed import compare_streamed
from runtime.verify.tokens import EncodedText, encode_text
from runtime.verify.windows import WindowPlan
from tests.faults.planted.copies import BF16, FP8, TINY, Copies, Copy
from tests.faults.planted.faults import FAULTS, LAYER, MTP

_TEXT = TINY.parent / "tiny_heldout.txt"
# 12, 14 and 42 are too small for some format, and stay in the count
_NUMBERS = (1, 3, 4, 8, 9, 12, 13, 14, 25, 36, 41, 42)
_LAYERS = {25: (LAYER, LAYER + 1), 41: (MTP,)}


@dataclass(frozen=True)
class _Sizes:
    context_length: int = 64
    stride: int | None = None
    num_tokens: int | None = 128
    seed: int = 0


@dataclass(frozen=True)
class Seen:
    """What the level makes of a fault in one copy."""

    number: int
    title: str
    form: str
    expected: tuple[int, ...]
    report: VerifyReport

    @property
    def is_caught(self) -> bool:
        return self.report.verdict == "fail"

    @property
    def is_named(self) -> bool:
        """Whether the layers that fail are those that were damaged, and no other."""
        return self.is_caught and self.report.wrong_layers == self.expected


@dataclass(frozen=True)
class Case:
    """A fault of the list, or that of the norm, in one copy; `expected` are the layers that it damages."""

    number: int
    title: str
    form: str
    expected: tuple[int, ...]

    def plant(self, copy: Copy) -> None:
        """Damage a copy."""
        if self.number == _NORM:
            _scale_norm(copy)
        else:
            next(fault for fault in FAULTS if fault.number == self.number).plant(copy)


_NORM = 0


def _scale_norm(copy: Copy) -> None:
    """A quarter of the gains in front of the MLP are lost."""
    name = f"model.layers.{LAYER}.post_attention_layernorm.weight"
    copy.change(name, lambda value: torch.cat((torch.ones(len(value) // 4), value[len(value) // 4 :].float())))


def _titles() -> dict[int, str]:
    titles = {fault.number: fault.title for fault in FAULTS if fault.number in _NUMBERS}
    # not of the list: no other measure of this level sees it
    return titles | {_NORM: "a quarter of the norm before the MLP lost"}


CASES = tuple(
    Case(number, title, form, _LAYERS.get(number, (LAYER,)))
    for number, title in _titles().items()
    for form in (BF16, FP8)
)


def text() -> EncodedText:
    """Return the tokens."""
    return encode_text(TINY, _TEXT.read_text(), _Sizes())


def see(copies: Copies, case: Case, folder: Path, read: EncodedText) -> Seen:
    """Plant a fault and run the level."""
    copy = copies.get(case.form)
    case.plant(copy)
    try:
        report = judge(TINY, copy.write(folder / "damaged"), read)
    finally:
        shutil.rmtree(folder)
    return Seen(case.number, case.title, case.form, case.expected, report)


def judge(source: Path, candidate: Path, read: EncodedText) -> VerifyReport:
    """Run the level on two folders."""
    scheme = compare_structure(source, candidate).scheme
    found = compare_streamed(source, candidate, read, StreamOptions(levels=frozenset({LAYERS})))
    return build_report((source, candidate), scheme, Levels(layers=found), PROFILES[scheme])


def section(seen: Sequence[Seen]) -> str:
    """Return the part of the page."""
    faults, caught = len({one.number for one in seen}), sum(one.is_caught for one in seen)
    named = sum(one.is_named for one in seen)
    plan: WindowPlan = text().plan
    lines = [
        "",
        "## With `--level layers` alone",
        "",
        "Nobody looks at weights or digests here, only at what each layer computes from the source's own input over",
        f"{plan.num_scored + len(plan.windows)} tokens of `tiny_heldout.txt`. *Named*: the layers that fail are the "
        "damaged ones, and no other. What is",
        "smaller than the rounding of a format passes; level `weights` finds it.",
        "",
        f"{faults} faults in {len(seen)} copies: {caught} caught, {named} named right.",
        "",
        "| # | fault | bf16 | FP8 | first place in FP8 |",
        "|---|---|---|---|---|",
    ]
    for number in dict.fromkeys(one.number for one in seen):
        plain, coded = (next(one for one in seen if (one.number, one.form) == (number, form)) for form in (BF16, FP8))
        place = coded.report.reasons[0].partition(":")[0] if coded.report.reasons else "none"
        lines.append(f"| {number or ''} | {plain.title} | {_word(plain)} | {_word(coded)} | {place} |")
    return "\n".join(lines) + "\n"


def _word(one: Seen) -> str:
    if one.is_named:
        return "named"
    layers = ", ".join(map(str, one.report.wrong_layers))
    return f"caught, layers {layers}" if one.is_caught else str(one.report.verdict)
