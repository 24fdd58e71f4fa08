"""The memory and the reads of verify's runs of models, told before anything is run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.config import Glm4MoeConfig
from glm4moe_cli._output import Output
from glm4moe_cli._text import format_bytes
from glm4moe_cli.commands._levels import LAYERS, RUNTIME
from glm4moe_cli.commands._models import ModelRuns, alone
from runtime.streaming.options import StreamOptions

if TYPE_CHECKING:
    from runtime.streaming.plan import StreamMemory

    # what a run takes, and the bytes of weights that it reads
    Planned = tuple[StreamMemory, int]


def plan_run(
    output: Output, runs: ModelRuns, source: Path | None, candidate: Path, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Plan memory and reads, print them before anything is run, and return them ready for JSON.

    Of several runs, one after the other, the memory is that of the one that needs most, the reads are those of all.

    Raises:
        InputError: a checkpoint that cannot be loaded, or two that do not correspond. ResourceError: too little memory.
    """
    facts: dict[str, object] = {"tokens": runs.text.plan.protocol, "compute": _compute_words(runs.how)}
    plan: dict[str, Any] = {**facts, "max_memory": runs.how.max_memory}
    planned = list(_planned(runs, source, candidate, options))
    memory, _ = max(planned, key=lambda one: one[0].peak_bytes)
    read_bytes = sum(num_bytes for _, num_bytes in planned)
    scratch = max(one.scratch_bytes for one, _ in planned)
    facts |= {
        "memory": _memory_words(memory),
        "reads": format_bytes(read_bytes),
        "scratch file": format_bytes(scratch) if scratch else "none",
    }
    for name, value in facts.items():
        # stdout begins with the verdict
        output.note(f"{name}: {value}")
    return plan | {"memory": memory, "peak_bytes": memory.peak_bytes, "read_bytes": read_bytes}


def _planned(runs: ModelRuns, source: Path | None, candidate: Path, options: Mapping[str, Any]) -> Iterator["Planned"]:
    """Yield each run, in order."""
    if options["save_reference"] is not None:
        from runtime.verify.store import saving_bytes

        saved = source or candidate
        yield _alone(runs, saved, saving_bytes(_vocab_size(saved)))
    if runs.compares and options["reference"] is not None:
        yield _beside_reference(runs, options["reference"], candidate, source)
    elif runs.compares:
        from runtime.verify.streamed import planned

        assert source is not None
        with planned(source, candidate, runs.text, runs.how) as job:
            yield job.memory, job.read_bytes
    if RUNTIME in runs.levels:
        from runtime.verify.engine_logprobs import matching_bytes

        yield _alone(runs, candidate, matching_bytes(_vocab_size(candidate)))


def _alone(runs: ModelRuns, folder: Path, behind: int) -> "Planned":
    from runtime.streaming.one import planned_one
    from runtime.streaming.rows import RowPlan

    plan = RowPlan(runs.text.token_ids, runs.text.plan.windows)
    with planned_one(folder, plan, alone(runs.how), behind=behind) as job:
        return job.memory, job.read_bytes


def _beside_reference(runs: ModelRuns, reference: Path, candidate: Path, source: Path | None) -> "Planned":
    from runtime.verify.reference import scoring_bytes
    from runtime.verify.replayed import planned_replay
    from runtime.verify.store import StoredReference

    with StoredReference.open(reference) as stored:
        if LAYERS not in runs.levels:
            return _alone(runs, candidate, scoring_bytes(stored, source, runs.how))
        with planned_replay(stored, candidate, runs.how, source=source) as job:
            return job.memory, job.read_bytes


def _vocab_size(folder: Path) -> int:
    return Glm4MoeConfig.from_folder(folder).vocab_size


def _memory_words(memory: "StreamMemory") -> str:
    parts = {
        "weights": memory.weights,
        "activations": memory.activations + memory.routing,
        "head and logits": memory.head,
        "hidden states": 0 if memory.hidden_on_disk else memory.hidden,
        "program": memory.base,
    }
    named = (f"{format_bytes(size)} {name}" for name, size in parts.items() if size)
    return f"{format_bytes(memory.peak_bytes)} at most: {', '.join(named)}"


def _compute_words(how: StreamOptions) -> str:
    """Return dtype, device and what is unusual about the computation."""
    words = f"{how.dtype} on {how.device}, activations {how.activations}"
    return f"{words}, deterministic" if how.deterministic else words
