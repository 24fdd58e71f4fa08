"""One model beside what was kept of another: the plan counts the head, a block of logits and their scores.

The vocabulary is large, so that these are nearly all that a run needs.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import read_tensors, small_checkpoint, small_config, write_checkpoint

from converters.errors import ResourceError
from runtime.streaming.options import LOGITS, StreamOptions
from runtime.streaming.plan import LOGIT_ROWS, StreamMemory
from runtime.verify.engine_logprobs import PromptScores, compare_engine
from runtime.verify.reference import compare_reference
from runtime.verify.store import StoredReference, save_reference
from runtime.verify.store_layout import ModelRun, OnPart, RunOptions
from runtime.verify.streamed import stream_one
from runtime.verify.tokens import EncodedText
from runtime.verify.windows import plan_windows

VOCAB_SIZE = 30_000
# blocks of logits follow each other, and the last one is not whole
TEXT = EncodedText(tuple(range(300)), plan_windows(300, context_length=300))
OPTIONS = StreamOptions(levels=frozenset({LOGITS}), floor=False, with_mtp=False)
ALONE = replace(OPTIONS, levels=frozenset())


class Runner:
    """Streams a model and keeps its plan."""

    def __init__(self) -> None:
        self.memory: StreamMemory | None = None

    def __call__(
        self,
        folder: Path,
        text: EncodedText,
        options: RunOptions,
        on_part: OnPart | None = None,
        *,
        behind: int | None = None,
    ) -> ModelRun:
        assert isinstance(options, StreamOptions)
        found = stream_one(folder, text, options, on_part, behind=behind)
        self.memory = found.memory
        return ModelRun(found.final_hidden_RD, found.routing_ids, found.norms)


Job = Callable[[Runner], object]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("memory") / "source", vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def other(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model with a head of its own."""
    tensors = read_tensors(folder)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 2
    return write_checkpoint(tmp_path_factory.mktemp("memory") / "other", tensors, small_config(vocab_size=VOCAB_SIZE))


@pytest.fixture(scope="module")
def kept(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "kept.safetensors"
    save_reference(path, folder, TEXT, ALONE, Runner(), with_head=True)
    return path


@pytest.fixture(params=["save", "reference", "engine"])
def job(
    request: pytest.FixtureRequest,
    folder: Path,
    other: Path,
    kept: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Job, StreamOptions]:
    """Return what runs one model by itself, with the options given, and the options that it is run with."""

    def save(runner: Runner, options: StreamOptions) -> None:
        save_reference(tmp_path / "saved.safetensors", folder, TEXT, options, runner)

    def compare(runner: Runner, options: StreamOptions) -> None:
        with StoredReference.open(kept) as stored:
            compare_reference(stored, other, options, runner)

    def ask(runner: Runner, options: StreamOptions) -> None:
        scores = PromptScores((None, *(-1.0 for _ in TEXT.token_ids[1:])), (None,) * len(TEXT.token_ids))
        monkeypatch.setattr("runtime.verify.engine_logprobs.engine_scores", lambda *_: [scores])
        compare_engine("engine", folder, TEXT, options, runner)

    jobs = {"save": (save, ALONE), "reference": (compare, OPTIONS), "engine": (ask, ALONE)}
    return jobs[request.param]


def held_at_most(work: Callable[[], object]) -> int:
    """Return the most bytes of tensors that this thread held at once, as the allocator reports them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_what_is_planned_is_no_less_than_what_is_held(job, monkeypatch):
    work, options = job
    runner = Runner()
    # room that is for what only two models need
    monkeypatch.setattr("runtime.streaming.plan._ERROR_BYTES", 0)
    most = held_at_most(lambda: work(runner, options))
    assert runner.memory is not None
    block = LOGIT_ROWS * VOCAB_SIZE * 4
    assert 2 * block < most <= runner.memory.peak_bytes - runner.memory.base


def test_hidden_states_go_to_disk_for_the_head_and_too_little_is_refused(job):
    work, options = job
    runner = Runner()
    work(runner, options)
    memory = runner.memory
    assert memory.head > memory.weights + memory.activations + memory.routing
    work(runner, replace(options, max_memory=memory.peak_bytes - 1))
    assert (memory.hidden_on_disk, runner.memory.hidden_on_disk) == (False, True)
    with pytest.raises(ResourceError, match="--max-memory: expected at least"):
        work(runner, replace(options, max_memory=runner.memory.peak_bytes - 1))
