"""Reading ahead: in order, each weight once, never more at a time than planned, and an end to every thread."""

import threading
from pathlib import Path

import pytest
import torch
from builders import small_checkpoint

from converters.errors import InputError
from converters.schema import parse
from converters.source import open_source
from runtime.model.loader import ModelLoader
from runtime.streaming.options import StreamOptions
from runtime.streaming.plan import peak_weights
from runtime.streaming.reading import ReadAhead, batches_ahead
from runtime.streaming.sides import Side, plan_batches


@pytest.fixture
def side(tmp_path):
    with open_source(small_checkpoint(tmp_path / "model", n_routed_experts=12)) as source:
        yield Side.of("model", source, StreamOptions())


@pytest.fixture
def single_experts(monkeypatch):
    """Every expert is a batch of its own."""
    monkeypatch.setattr("runtime.streaming.sides.GROUP_BYTES", 1)


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read")]


@pytest.mark.usefixtures("single_experts")
@pytest.mark.parametrize("workers", [1, 4])
def test_batches_come_in_order_and_are_gone_afterwards(side, workers):
    batches, done = plan_batches([side]), list[int]()
    with ReadAhead([side.loader], batches, workers, done.append) as reads:
        for batch in batches:
            assert reads.peek() is batch
            with reads.resident() as found:
                assert found is batch
                assert all(side.loader.model.get_parameter(name).device.type == "cpu" for name in batch.names[0])
        assert reads.peek() is None
    assert all(parameter.device.type == "meta" for parameter in side.loader.model.parameters())
    assert sum(done) == reads.bytes_read == sum(side.loader.stored_bytes(batch.names[0]) for batch in batches)
    assert reading_threads() == []


@pytest.mark.usefixtures("single_experts")
def test_layers_are_covered_once_and_without_the_embedding(side):
    names = [name for batch in plan_batches([side]) for name in batch.names[0]]
    assert len(names) == len(set(names))
    assert set(side.loader.parameter_names) - set(names) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert side.head_names() == ("lm_head.weight",)


@pytest.mark.usefixtures("single_experts")
@pytest.mark.parametrize("workers", [1, 2])
def test_no_more_is_held_than_planned(side, workers, monkeypatch):
    """Counted when a read begins and when a weight is released; the plan adds the raw bytes of what is widened."""
    batches = plan_batches([side])
    lock, held, peak = threading.Lock(), 0, 0
    fetch, release = ModelLoader.fetch, ModelLoader.release

    def counted_fetch(self, names, **how):
        nonlocal held, peak
        with lock:
            held += self.held_bytes(names, as_stored=True)
            peak = max(peak, held)
        return fetch(self, names, **how)

    def counted_release(self, names):
        nonlocal held
        release(self, names)
        with lock:
            held -= self.held_bytes(names, as_stored=True)

    monkeypatch.setattr(ModelLoader, "fetch", counted_fetch)
    monkeypatch.setattr(ModelLoader, "release", counted_release)
    with ReadAhead([side.loader], batches, workers, float) as reads:
        while (batch := reads.peek()) is not None:
            with reads.resident():
                if batch.layer is not None:
                    with reads.resident():
                        while (inner := reads.peek()) is not None and inner.experts:
                            with reads.resident():
                                pass
    whole = sum(parameter.numel() * 4 for parameter in side.loader.model.parameters())
    largest = max(side.loader.stored_bytes((name,)) for batch in batches for name in batch.names[0])
    assert held == 0
    assert 0 < peak <= peak_weights([side], batches, workers) - workers * largest < whole


@pytest.mark.usefixtures("single_experts")
def test_experts_take_turns_in_the_same_memory(side):
    """Memory given back to malloc by one thread and asked for by another piles up."""
    with ReadAhead([side.loader], plan_batches([side]), 1, float) as reads:
        places = dict[str, int]()
        while reads.peek() is not None:
            with reads.resident() as batch:
                names = batch.names[0] if batch.experts else ()
                places |= {name: side.loader.model.get_parameter(name).data_ptr() for name in names}
    assert len(places) == 3 * 12 * 3
    assert len(set(places.values())) <= 3 * (1 + batches_ahead(1))


def test_a_read_that_fails_is_raised_where_the_weight_is_needed_and_ends_the_threads(side, monkeypatch):
    batches, fetch = plan_batches([side]), ModelLoader.fetch
    broken = batches[3]

    def failing(self, names, **how):
        if tuple(names) == broken.names[0]:
            raise InputError("tensor x", expected="readable data", found="none")
        return fetch(self, names, **how)

    monkeypatch.setattr(ModelLoader, "fetch", failing)
    used = []

    def use_all(reads: ReadAhead) -> None:
        for batch in batches:
            with reads.resident():
                used.append(batch)

    with pytest.raises(InputError, match="tensor x"), ReadAhead([side.loader], batches, 2, float) as reads:
        use_all(reads)
    assert used == batches[:3]
    assert reading_threads() == []


def test_an_error_of_the_user_ends_the_threads(side):
    with (
        pytest.raises(ZeroDivisionError),
        ReadAhead([side.loader], plan_batches([side]), 2, float) as reads,
        reads.resident(),
    ):
        raise ZeroDivisionError
    assert reading_threads() == []


def test_reading_ahead_is_bounded(side, monkeypatch):
    """However long the first batch is in use, no more than the allowed number is read behind it."""
    started, fetch = list[tuple[str, ...]](), ModelLoader.fetch

    def listed(self, names, **how):
        started.append(tuple(names))
        return fetch(self, names, **how)

    monkeypatch.setattr(ModelLoader, "fetch", listed)
    batches = plan_batches([side])
    with ReadAhead([side.loader], batches, 1, float) as reads, reads.resident():
        reads._threads.submit(int).result()
        assert started == [batch.names[0] for batch in batches[: 1 + batches_ahead(1)]]


@pytest.mark.usefixtures("single_experts")
def test_experts_that_nobody_needs_are_not_read(side, monkeypatch):
    """Those of the layer at hand, but for what is being read already; those of the next layer are another matter."""
    batches, done, fetched, fetch = plan_batches([side]), list[int](), list[str](), ModelLoader.fetch
    begun = threading.Event()

    def listed(self, names, **how):
        fetched.extend(names)
        if any(".experts." in name for name in names):
            begun.set()
        return fetch(self, names, **how)

    monkeypatch.setattr(ModelLoader, "fetch", listed)
    with ReadAhead([side.loader], batches, 1, done.append) as reads:
        for batch in batches:
            if batch.layer == 1 and batch.what.endswith("mlp"):
                break
            with reads.resident():
                pass
        with reads.resident():
            assert begun.wait(60)
            reads.narrow(1, [frozenset({4, 9})])
        while reads.peek() is not None:
            with reads.resident():
                pass
    experts = {
        layer: {parse(name).expert for name in fetched if f"layers.{layer}.mlp.experts." in name} for layer in (1, 2)
    }
    # one thread reads one batch, and may just have begun the next
    assert {4, 9} <= experts[1] <= {0, 1, 2, 4, 9}
    assert experts[2] == set(range(12))
    whole = sum(side.loader.stored_bytes(batch.names[0]) for batch in batches)
    assert sum(done) == whole == reads.bytes_read + reads.bytes_skipped
    assert reads.bytes_skipped == sum(
        side.loader.stored_bytes(batch.names[0])
        for batch in batches
        if batch.layer == 1 and batch.experts and batch.experts[0] not in experts[1]
    )


def test_a_batch_is_narrowed_side_by_side(side):
    batch = next(batch for batch in plan_batches([side, side]) if batch.experts)
    narrowed = batch.narrowed([frozenset({1}), frozenset({1, 3})])
    assert [{parse(name).expert for name in names} for names in narrowed.names] == [{1}, {1, 3}]
    assert narrowed.experts == batch.experts
    assert batch.narrowed([frozenset(), frozenset()]).experts == range(0)


def test_weights_come_as_they_are_stored_and_are_widened_on_use(tmp_path, make_small):
    from converters.job import run
    from converters.pipeline import RunOptions
    from converters.quantize import QuantizeOptions, plan_quantize

    with open_source(make_small("plain")) as source:
        run(plan_quantize(source, QuantizeOptions(scheme="fp8")), tmp_path / "fp8", RunOptions(workers=1), float)
    for folder, dtype in (("plain", torch.bfloat16), ("fp8", torch.float8_e4m3fn)):
        with open_source(Path(tmp_path / folder)) as source:
            loader = Side.of("model", source, StreamOptions()).loader
            names = [name for name in loader.layer_names(0) if ".q_proj." in name or "q_norm" in name]
            loader.place(loader.fetch(names, as_stored=True))
            module = loader.model.get_submodule("model.layers.0.self_attn.q_proj")
            assert module.weight.dtype is dtype
            assert module.in_blocks
            others = [name for name in names if not name.endswith("q_proj.weight")]
            assert {loader.model.get_parameter(name).dtype for name in others} == {torch.float32}
            hidden = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
            expected = hidden.double() @ module.dequantized(torch.float32).double().T + module.bias.double()
            torch.testing.assert_close(module(hidden).double(), expected, rtol=1e-5, atol=1e-5)
