"""README.md of a quantized result: what it is, what was left out, measured errors, how to serve it.

It names no path, host or time, so that the same job writes the same card. What was not measured is said to be so.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converters.conversion import passthrough_files
from converters.download import card_metadata, render_card
from converters.quant.quality import SAMPLE_EVERY, TensorQuality, by_role, mean, worst
from converters.source import Source

CARD_FILE = "README.md"
# what a card of ours is known by, and where it has commands of engines
QUANTIZED_BY = "glm4moe"
SERVING = "## Serving"
# what a derived work takes over from the card of its base
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
WORST = 10


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of one role: how many, their parameters, and how they are stored, in words."""

    role: str
    tensors: int
    parameters: int
    stored: str


@dataclass(frozen=True, slots=True)
class Serving:
    """An engine: the command that serves the folder, or why there is none; `note` is what to know beside it."""

    engine: str
    command: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card says.

    Attributes:
        base: released model that this is, as `GLM-4.6`, or a derivative of one; empty if it is none.
        repository: its id on the hub, if it is a released model.
        scheme: as the command line spells it.
        format: whose names and config.
        options: the command's options that are not defaults, as typed.
        version: of this program.
        source_digest: sha256 over the source's headers and config.
        num_parameters: of all tensors.
        num_bytes: of all tensors.
        weights: every role, quantized or not.
        calibration: what was calibrated on, a line each; none for a data-free scheme.
        notes: what engines are known to do, a sentence each.
        quality: measured errors by tensor.
        serving: the engines.
        tensor_parallel: sizes that fit by layout, in words.
    """

    base: str
    repository: str | None
    scheme: str
    format: str
    options: str
    version: str
    source_digest: str
    num_parameters: int
    num_bytes: int
    weights: Sequence[Weights]
    calibration: Sequence[str]
    notes: Sequence[str]
    quality: Mapping[str, TensorQuality]
    serving: Sequence[Serving]
    tensor_parallel: str


def build_card(facts: CardFacts, source_card: str) -> bytes:
    """Return README.md.

    Args:
        facts: what it says.
        source_card: README.md of the source, for licence and language; empty if it has none.
    """
    known = card_metadata(source_card) if source_card.startswith("---") else {}
    inherited = {key: value for key, value in known.items() if key in _INHERITED}
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **inherited,
        "tags": ["glm4_moe", facts.format, *facts.scheme.replace("=", " ").replace(",", " ").split(), "glm4moe"],
        "quantized_by": QUANTIZED_BY,
    }
    if facts.repository:
        metadata |= {"base_model": facts.repository, "base_model_relation": "quantized"}
    sections = (_head(facts), _what(facts), _errors(facts), _serving(facts), _made(facts))
    return render_card(metadata, "\n\n".join(sections) + "\n").encode()


def card_notes(source: Source) -> tuple[str, ...]:
    """Return what to say where the weights are stored in another format: no card, rather than one of the old format."""
    if CARD_FILE not in passthrough_files(source.folder):
        return ()
    return (f"{CARD_FILE} of the source is left out: it describes the format that it has there.",)


def _head(facts: CardFacts) -> str:
    name = facts.base or "GLM-4 MoE model"
    bits = 8 * facts.num_bytes / facts.num_parameters
    return (
        f"# {name}, {facts.scheme}\n\n"
        f"{name} with weights in `{facts.scheme}`, stored as `{facts.format}`: {facts.num_bytes / 1e9:.3g} GB, "
        f"{bits:.2f} bits per parameter over {facts.num_parameters:,} parameters."
    )


def _what(facts: CardFacts) -> str:
    rows = [(w.role, f"{w.tensors:,}", f"{w.parameters:,}", w.stored) for w in facts.weights]
    return "## What is quantized and what is not\n\n" + _table(("weights", "tensors", "parameters", "stored as"), rows)


def _errors(facts: CardFacts) -> str:
    """Return measured weight errors by role, and the worst tensors."""
    if not facts.quality:
        return "## Errors\n\nNot measured."
    columns = ("weights", "tensors", "relative error", "worst", "SQNR dB", "clipped")
    rows = [(role, f"{len(found)}", *_figures(found)) for role, found in by_role(facts.quality).items()]
    bad = [(f"`{name}`", *_one(quality)) for name, quality in worst(facts.quality, WORST)]
    return (
        "## Errors of the weights\n\n"
        f"Measured against the source on every {SAMPLE_EVERY}th row of each tensor while it was written. Relative "
        "error: square root of the summed squared differences over the summed squares. Clipped: share of the values "
        "beyond the largest code. Logits, perplexity and tasks: not measured here; `glm4moe verify` does.\n\n"
        f"{_table(columns, rows)}\n\nThe worst {len(bad)}:\n\n"
        f"{_table(('tensor', 'relative error', 'SQNR dB', 'clipped'), bad)}"
    )


def _figures(found: Sequence[TensorQuality]) -> tuple[str, str, str, str]:
    figures, largest = mean(found), max(quality.relative_error for quality in found)
    return f"{figures.relative_error:.4f}", f"{largest:.4f}", f"{figures.sqnr_db:.1f}", f"{figures.clipped:.2%}"


def _one(quality: TensorQuality) -> tuple[str, str, str]:
    return f"{quality.relative_error:.4f}", f"{quality.sqnr_db:.1f}", f"{quality.clipped:.2%}"


def _serving(facts: CardFacts) -> str:
    parts = [
        f"{SERVING}\n\nTensor-parallel sizes that fit these weights: {facts.tensor_parallel}. In this file's folder:"
    ]
    for serving in facts.serving:
        shown = f"```\n{serving.command}\n```" if serving.command else "Not supported."
        note = f"\n\n{serving.note}" if serving.note else ""
        parts.append(f"**{serving.engine}**\n\n{shown}{note}")
    if facts.notes:
        parts.append("\n".join(["What is known of engines:\n", *(f"- {note}" for note in facts.notes)]))
    return "\n\n".join(parts)


def _made(facts: CardFacts) -> str:
    lines = [
        f"- `glm4moe quantize SRC DST {facts.options}`, glm4moe {facts.version}",
        f"- sha256 over the source's headers and config: `{facts.source_digest}`",
        "- origin, transform and digest of every tensor: `glm4moe-manifest.json`",
    ]
    lines += facts.calibration or ["- Data-free: no text was used."]
    return "## How it was made\n\n" + "\n".join(lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
