"""The levels of verify that run models: which tokens, in what memory, against what."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.errors import UsageError
from glm4moe_cli._output import Output
from glm4moe_cli._text import format_bytes
from glm4moe_cli.commands._levels import LAYERS, LOGITS, RUNTIME
from runtime.streaming.options import DEFAULT_MAX_MEMORY, StreamOptions
from runtime.verify.further_checks import near_tie
from runtime.verify.limits import Limits, Overrides, choose_limits
from runtime.verify.windows import DEFAULT_CONTEXT_LENGTH

if TYPE_CHECKING:
    from glm4moe_cli._progress import Progress
    from runtime.verify.engine_logprobs import EngineComparison
    from runtime.verify.reference import ReferenceComparison
    from runtime.verify.results import ModelComparison
    from runtime.verify.store_layout import ReferenceFacts, Runner
    from runtime.verify.text_results import TextReport
    from runtime.verify.tokens import EncodedText

# tokens and context where layers are compared and the user asks for nothing: nearly every expert is hit, and 355B takes
# minutes on a CPU, and on a GPU less than reading it
_DEFAULT_SIZES = {"cpu": (512, 64), "cuda": (32768, 1024)}


@dataclass(frozen=True, slots=True)
class TokenSizes:
    """What decides the windows; see `runtime.verify.windows`."""

    context_length: int
    stride: int | None
    num_tokens: int | None
    seed: int


@dataclass(frozen=True, slots=True)
class ModelRuns:
    """Everything that running models needs, checked as far as it can be before anything long is begun.

    Attributes:
        text: tokens and windows.
        how: what is computed.
        levels: of LAYERS and LOGITS and RUNTIME, those asked for.
    """

    text: "EncodedText"
    how: StreamOptions
    levels: tuple[str, ...]

    @property
    def compares(self) -> bool:
        """Whether a candidate is compared with a source or its reference."""
        return bool({LAYERS, LOGITS} & set(self.levels))


def plan_models(tokenizer: Path, options: Mapping[str, Any], levels: tuple[str, ...]) -> ModelRuns:
    """Read and encode the tokens.

    Args:
        tokenizer: the checkpoint whose tokenizer is used.
        options: of the command line.
        levels: that are run.
    Raises:
        UsageError, InputError: text, tokens, sizes or tokenizer cannot be used.
    """
    from runtime.config import resolve_device

    device = resolve_device(options["device"])
    how = StreamOptions(
        levels=frozenset({LAYERS, LOGITS} & set(levels)),
        device=device,
        max_memory=options["max_memory"] or DEFAULT_MAX_MEMORY,
        **{name: options[name] for name in ("activations", "deterministic", "floor", "seed", "workers")},
    )
    return ModelRuns(_read_tokens(tokenizer, options, _sizes(options, device, levels)), how, levels)


def _sizes(options: Mapping[str, Any], device: str, levels: tuple[str, ...]) -> TokenSizes:
    num_tokens, context_length = options["num_tokens"], options["context_length"]
    if LAYERS in levels and num_tokens is None and context_length is None:
        num_tokens, context_length = _DEFAULT_SIZES[device]
    return TokenSizes(context_length or DEFAULT_CONTEXT_LENGTH, options["stride"], num_tokens, options["seed"])


def _read_tokens(tokenizer: Path, options: Mapping[str, Any], sizes: TokenSizes) -> "EncodedText":
    from runtime.verify.corpus import encode_corpus
    from runtime.verify.tokens import encode_text, encode_tokens

    if options["reference"] is not None:
        from runtime.verify.store import StoredReference

        with StoredReference.open(options["reference"]) as stored:
            return stored.text
    if options["tokens"] is not None:
        return encode_tokens(tokenizer, options["tokens"], sizes)
    if options["text"] is not None:
        return encode_text(tokenizer, _read_text(options["text"]), sizes)
    return encode_corpus(tokenizer, sizes)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        found = f"{error.reason} at byte {error.start}"
        raise UsageError(f"--text {path}", expected="valid UTF-8", found=found) from error


def model_limits(scheme: str, options: Mapping[str, Any], how: StreamOptions) -> Limits:
    """Return what the models are held against."""
    overrides = Overrides(**{field.name: options[field.name] for field in fields(Overrides)})
    # a GPU adds up in any order, and a stored reference comes from another process
    is_live = options["reference"] is None
    alike = is_live and (how.device == "cpu" or how.deterministic)
    return choose_limits(
        scheme, overrides, activations=how.activations, computed_alike=alike, has_floor=is_live and how.floor
    )


def compare_models(output: Output, folders: tuple[Path, Path], runs: ModelRuns) -> "ModelComparison":
    """Run both models, layer by layer."""
    from runtime.verify.streamed import planned

    with planned(*folders, runs.text, runs.how) as job, output.progress("models", job.read_bytes) as progress:
        return job.run(progress)


def compare_with_reference(
    output: Output, reference: Path, candidate: Path, runs: ModelRuns, source: Path | None
) -> "ReferenceComparison":
    """Run the candidate and compare it with what was kept of the source."""
    from runtime.verify.reference import compare_reference
    from runtime.verify.replayed import planned_replay
    from runtime.verify.store import StoredReference

    with StoredReference.open(reference) as stored, output.progress("models", _weight_bytes(candidate)) as progress:
        if LAYERS in runs.levels:
            with planned_replay(stored, candidate, runs.how, source=source) as job:
                return job.run(progress)
        run = _runner(runs.how, progress)
        return compare_reference(stored, candidate, runs.how, run, seed=runs.how.seed, source=source)


def save(output: Output, source: Path, runs: ModelRuns, options: Mapping[str, Any]) -> "ReferenceFacts":
    """Run a model and keep what it made of the tokens."""
    from runtime.verify.store import save_reference

    with output.progress("reference", _weight_bytes(source)) as progress:
        facts = save_reference(
            options["save_reference"],
            source,
            runs.text,
            runs.how,
            _runner(runs.how, progress),
            with_head=options["save_head"],
            with_inputs=options["save_inputs"],
        )
    size = options["save_reference"].stat().st_size
    output.note(f"Reference: {options['save_reference']}, {format_bytes(size)}, {runs.text.plan.num_scored} tokens")
    return facts


def check_room(folders: tuple[Path, Path], device: str) -> None:
    """Refuse, before anything long is begun, models that are too large to answer prompts here."""
    from runtime.config import resolve_device
    from runtime.verify.text_level import check_memory
    from runtime.verify.text_results import TextOptions

    for folder in folders:
        check_memory(folder, TextOptions(device=resolve_device(device)))


def check_answers(folders: tuple[Path, Path], scheme: str, device: str) -> "TextReport":
    """Let both models answer a few prompts."""
    from runtime.config import resolve_device
    from runtime.verify.text_level import check_text
    from runtime.verify.text_results import TextOptions

    return check_text(*folders, TextOptions(device=resolve_device(device), max_gap=near_tie(scheme)))


def compare_with_engine(output: Output, candidate: Path, runs: ModelRuns, where: str) -> "EngineComparison":
    """Run the candidate and compare it with what an engine that serves it says."""
    from runtime.verify.engine_logprobs import compare_engine

    assert RUNTIME in runs.levels
    with output.progress("engine", _weight_bytes(candidate)) as progress:
        run = _runner(runs.how, progress)
        return compare_engine(where, candidate, runs.text, runs.how, run, seed=runs.how.seed)


def _runner(how: StreamOptions, progress: "Progress") -> "Runner":
    """Return what runs one model as the comparison of two does."""
    from runtime.verify.store_layout import ModelRun, OnPart, RunOptions
    from runtime.verify.streamed import stream_one

    def run(
        folder: Path,
        text: "EncodedText",
        options: RunOptions,
        on_part: OnPart | None = None,
        *,
        behind: int | None = None,
    ) -> ModelRun:
        found = stream_one(folder, text, alone(how), on_part, progress, behind=behind)
        return ModelRun(found.final_hidden_RD, found.routing_ids, found.norms)

    return run


def alone(how: StreamOptions) -> StreamOptions:
    """Return how one model is run by itself: as in a comparison, but without its MTP layer."""
    return replace(how, with_mtp=False)


def _weight_bytes(*folders: Path) -> int:
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*.safetensors"))
