"""A candidate against a stored reference: the same figures as against the source itself, without the source.

Shape suffixes: R rows of all windows, S scored tokens, D hidden.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from converters.checkpoint.manifest import source_digest
from converters.config import CONFIG_FILE, Glm4MoeConfig
from converters.errors import InputError, UsageError
from converters.shard.whole import open_whole
from runtime.config import EngineConfig
from runtime.model.linear import Linear
from runtime.model.loader import ModelLoader
from runtime.streaming.memory import FP32
from runtime.streaming.rows import RowPlan
from runtime.verify.head import head_digest, head_names, load_head
from runtime.verify.results import ModelComparison
from runtime.verify.routing import LayerRouting, RoutingCounter
from runtime.verify.store import StoredReference
from runtime.verify.store_layout import CONFIG_FIELDS, ModelRun, Runner, RunOptions, row_starts, tokens_digest
from runtime.verify.streamed_layers import CANDIDATE
from runtime.verify.streamed_logits import Scorer
from runtime.verify.summary import summarize
from runtime.verify.tokens import EncodedText

REFERENCE_OPTION = "--reference"


@dataclass(frozen=True, slots=True)
class ReferenceComparison:
    """What a candidate and a stored reference have in common.

    Attributes:
        models: as from a comparison with the source; without MTP layer and floor, and with layers only where the
            reference keeps them.
        routing: agreement of the experts by layer, both sides on their own hidden states.
        source_digest: of the model that the reference was made of.
    """

    models: ModelComparison
    routing: tuple[LayerRouting, ...]
    source_digest: str


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of both sides; one and the same where the candidate's is the reference's."""

    reference: Linear
    candidate: Linear


def check_reference(
    stored: StoredReference,
    candidate: Path,
    options: RunOptions,
    *,
    text: EncodedText | None = None,
    source: Path | None = None,
) -> None:
    """Refuse a reference that says nothing about this comparison; only headers are read.

    Args:
        stored: the reference.
        candidate: checkpoint folder.
        options: how the candidate is to be run.
        text: tokens that were asked for, if any: they must be the reference's.
        source: the checkpoint that the reference is said to be of, if it is at hand.
    Raises:
        UsageError: other tokens, windows, dtype or activations. InputError: another vocabulary or other sizes, or
            another source.
    """
    facts, name = stored.facts, f"{REFERENCE_OPTION} {stored.path}"
    for field in ("dtype", "activations"):
        asked, kept = getattr(options, field), getattr(facts, field)
        if asked != kept:
            raise UsageError(
                f"{name}: {field}",
                expected=asked,
                found=kept,
                next_step="Compare the way the reference was run, or save another one.",
            )
    if text is not None and tokens_digest(text) != facts.tokens_digest:
        raise UsageError(
            name,
            expected="the tokens and windows that were asked for",
            found=f"others: {stored.text.plan.protocol}",
            next_step="Leave out text, tokens and window sizes: the reference has its own.",
        )
    config = Glm4MoeConfig.from_folder(candidate)
    for field in CONFIG_FIELDS:
        if getattr(config, field) != getattr(facts, field):
            raise InputError(
                f"{candidate / CONFIG_FILE}: {field}",
                expected=f"{getattr(facts, field)}, as in the reference {stored.path}",
                found=str(getattr(config, field)),
                next_step="The reference was made of another model.",
            )
    if source is not None:
        _check_source(stored, source)


def _check_source(stored: StoredReference, source: Path) -> None:
    with open_whole(source) as opened:
        found = source_digest(opened.reader, opened.raw_config)
    if found != stored.facts.source_digest:
        raise InputError(
            f"{REFERENCE_OPTION} {stored.path}",
            expected=f"a reference of {source}, digest {found[:16]}",
            found=f"one of digest {stored.facts.source_digest[:16]}",
            next_step="It was made of another model, or of an earlier state of it; save it again.",
        )


def compare_reference(
    stored: StoredReference,
    candidate: Path,
    options: RunOptions,
    runner: Runner,
    *,
    seed: int = 0,
    source: Path | None = None,
) -> ReferenceComparison:
    """Run a candidate on the reference's tokens and compare; see `check_reference` for what is refused.

    The reference's logits are made with the candidate's own head where its values are the reference's, else with the
    head that the file keeps, else with that of `source`.

    Args:
        stored: the reference.
        candidate: checkpoint folder.
        options: how to run it.
        runner: what runs it.
        seed: of the bootstrap.
        source: the reference's checkpoint, if it is at hand.
    Raises:
        InputError: the head that belongs to the hidden states is nowhere.
    """
    check_reference(stored, candidate, options, source=source)
    # a head that is nowhere is found before the run; none is held while layers are
    find_heads(stored, candidate, options, source=source)
    run = runner(candidate, stored.text, options, behind=scoring_bytes(stored, source, options))
    heads = find_heads(stored, candidate, options, source=source)
    hidden_RD = stored.hidden(0, len(run.final_hidden_RD))
    return ReferenceComparison(
        models=score_reference(stored, hidden_RD, run, heads, options, seed=seed),
        routing=routing_agreement(stored, run),
        source_digest=stored.facts.source_digest,
    )


def find_heads(stored: StoredReference, candidate: Path, options: RunOptions, *, source: Path | None = None) -> Heads:
    """Return the candidate's head and the one that the stored hidden states were made for."""
    own = _head_of(candidate, options)
    if head_digest(own) == stored.facts.head_digest:
        return Heads(own, own)
    kept = stored.head()
    if kept is None and source is not None:
        kept = _head_of(source, options)
        if head_digest(kept) != stored.facts.head_digest:
            kept = None
    if kept is None:
        raise InputError(
            f"{REFERENCE_OPTION} {stored.path}",
            expected=f"the head of the reference, digest {stored.facts.head_digest[:16]}",
            found=f"only the head of {candidate}, which has other values",
            next_step="Save the reference with its head, or compare with the source itself.",
        )
    return Heads(kept.to(own.weight.device), own)


def other_head_bytes(stored: StoredReference, source: Path | None, options: RunOptions) -> int:
    """Return the most bytes of a head that `find_heads` holds beside the candidate's own; only headers are read."""
    if stored.head_bytes or source is None:
        return stored.head_bytes
    with open_whole(source) as opened:
        loader = ModelLoader(opened, EngineConfig(dtype=options.dtype, device=options.device), with_mtp=False)
        return loader.held_bytes(head_names(loader), as_stored=True)


def scoring_bytes(stored: StoredReference, source: Path | None, options: RunOptions) -> int:
    """Return the most bytes that `compare_reference` holds beside the candidate's head and a block of logits.

    These are the reference's own head and its final hidden states, (R, D) fp32; only headers are read.
    """
    hidden_bytes = row_starts(stored.text.plan)[-1] * stored.facts.hidden_size * FP32
    return other_head_bytes(stored, source, options) + hidden_bytes


def _head_of(folder: Path, options: RunOptions) -> Linear:
    with open_whole(folder) as source:
        engine = EngineConfig(dtype=options.dtype, device=options.device)
        return load_head(ModelLoader(source, engine, with_mtp=False))


@torch.inference_mode()
def score_reference(
    stored: StoredReference, hidden_RD: torch.Tensor, run: ModelRun, heads: Heads, options: RunOptions, *, seed: int
) -> ModelComparison:
    """Compare what a candidate made of the reference's tokens with what the reference made of them.

    hidden_RD (R, D) fp32 are the reference's final hidden states, which a run beside them has at hand.
    """
    text = stored.text
    plan = RowPlan(text.token_ids, text.plan.windows)
    scorer = Scorer(text, plan, (heads.reference, heads.candidate), seed, getattr(options, "deterministic", False))
    tokens = scorer.main((hidden_RD, run.final_hidden_RD))
    return ModelComparison(
        protocol=text.plan.protocol,
        dtype=options.dtype,
        device=options.device,
        activations=options.activations,
        layers=(),
        tokens=tokens,
        summary=summarize(tokens.scores, tokens.windows_T, seed=seed),
        mtp=None,
        floor=None,
        first_non_finite=tuple(_first_non_finite(stored, run)),
    )


def _first_non_finite(stored: StoredReference, run: ModelRun) -> Iterator[str]:
    """Yield the first layer behind which the candidate's hidden states are not finite, and the first token of it."""
    for layer, norms_R in sorted(run.norms.items()):
        bad_N = (~norms_R.isfinite()).nonzero()[:, 0]
        if len(bad_N):
            positions = RowPlan(stored.text.token_ids, stored.text.plan.windows).positions
            yield f"{CANDIDATE}: layer {layer}, hidden state, token {int(positions[bad_N[0]])}"
            return


def routing_agreement(stored: StoredReference, run: ModelRun) -> tuple[LayerRouting, ...]:
    """Return the agreement of the experts by layer, over the rows that make scored predictions, as with the source."""
    counter, starts, kept = RoutingCounter(), row_starts(stored.text.plan), stored.routing_ids()
    for window in stored.text.plan.windows:
        rows = slice(starts[window.index], starts[window.index + 1])
        counter.add(
            {layer: ids[rows][window.logit_rows] for layer, ids in kept.items()},
            {layer: run.routing_ids[layer][rows][window.logit_rows] for layer in kept},
        )
    return counter.result()
