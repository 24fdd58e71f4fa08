"""One model, a part of a layer at a time: the same as the whole model, in little memory, whatever the layout."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from converters.convert import ConvertOptions, plan_convert
from converters.errors import ResourceError
from converters.job import run
from converters.layout import Layout
from converters.pipeline import RunOptions
from converters.quantize import QuantizeOptions, plan_quantize
from converters.source import open_source
from runtime.config import EngineConfig
from runtime.model.loader import ModelLoader, load_model
from runtime.streaming.one import OneModel, stream_one
from runtime.streaming.options import StreamOptions
from runtime.verify.tokens import EncodedText
from tests.runtime.streaming.conftest import random_text, row_plan

TINY = Path(__file__).parents[3] / "fixtures" / "tiny"
DETERMINISTIC = StreamOptions(deterministic=True)
TEXT = random_text(70)


def streamed(folder: Path, text: EncodedText = TEXT, options: StreamOptions = DETERMINISTIC) -> OneModel:
    return stream_one(folder, row_plan(text), options)


@torch.inference_mode()
def in_memory(
    folder: Path, text: EncodedText = TEXT, dtype: str = "float32"
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Return final hidden states, MTP states, and expert ids by layer of the loaded model, window after window."""
    loaded = load_model(folder, EngineConfig(dtype=dtype))
    finals, drafts, ids = [], [], dict[int, list[torch.Tensor]]()

    def observe(routing):
        ids.setdefault(routing.layer, []).append(routing.topk_ids_TK)

    for window in text.plan.windows:
        tokens = torch.tensor([text.token_ids[window.begin : window.end]])
        finals.append(loaded.model(tokens, observer=observe)[0].float())
        embedded = loaded.model.embed(tokens[:, 1:])
        drafts.append(loaded.mtp.draft(embedded, finals[-1][None, :-1].to(embedded.dtype), observer=observe)[0].float())
    return torch.cat(finals), torch.cat(drafts), {layer: torch.cat(parts) for layer, parts in ids.items()}


def without_last_rows(rows_RD: torch.Tensor, text: EncodedText = TEXT) -> torch.Tensor:
    ends = [0]
    for window in text.plan.windows:
        ends.append(ends[-1] + window.end - window.begin)
    return torch.cat([rows_RD[begin : end - 1] for begin, end in pairwise(ends)])


def assert_equal(one: OneModel, expected: tuple[torch.Tensor, torch.Tensor, dict], text: EncodedText = TEXT) -> None:
    finals, drafts, ids = expected
    assert torch.equal(one.final_hidden_RD, finals)
    assert one.mtp_hidden_RD is not None
    assert torch.equal(without_last_rows(one.mtp_hidden_RD, text), drafts)
    assert one.routing_ids.keys() == ids.keys()
    assert all(torch.equal(one.routing_ids[layer], ids[layer]) for layer in ids)


@pytest.mark.parametrize("stride", [None, 7])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_streaming_equals_the_model_in_memory_bit_for_bit(make_small, dtype, stride):
    folder, text = make_small("model"), random_text(70, stride=stride)
    one = streamed(folder, text, StreamOptions(deterministic=True, dtype=dtype))
    assert_equal(one, in_memory(folder, text, dtype), text)


def test_the_trained_model_streams_bit_for_bit():
    text = random_text(130, context_length=50)
    assert_equal(streamed(TINY, text), in_memory(TINY, text), text)


def test_a_quantized_model_streams_bit_for_bit(make_small, tmp_path):
    with open_source(make_small("model")) as source:
        run(plan_quantize(source, QuantizeOptions(scheme="fp8")), tmp_path / "fp8", RunOptions(workers=1), float)
    assert_equal(streamed(tmp_path / "fp8"), in_memory(tmp_path / "fp8"))


@pytest.mark.parametrize("layout", [Layout.PACKED, Layout.FUSED, Layout.FUSED_SHARED])
def test_the_layout_changes_no_bit(make_small, tmp_path, layout):
    folder = make_small("model")
    with open_source(folder) as source:
        run(plan_convert(source, ConvertOptions(layout=layout)), tmp_path / "other", RunOptions(workers=1), float)
    assert_equal(streamed(tmp_path / "other"), in_memory(folder))


def test_fast_streaming_is_close_to_the_model_in_memory(make_small, monkeypatch):
    """Long windows go through attention in chunks, with a cache."""
    monkeypatch.setattr("runtime.streaming.layer.CHUNK_TOKENS", 9)
    folder = make_small("model")
    one, (finals, drafts, ids) = streamed(folder, options=StreamOptions()), in_memory(folder)
    torch.testing.assert_close(one.final_hidden_RD, finals, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(without_last_rows(one.mtp_hidden_RD), drafts, rtol=1e-5, atol=1e-5)
    # chunks of a window are put together again: all rows are there, and in order
    assert all(torch.equal(one.routing_ids[layer], ids[layer]) for layer in ids)


def test_norms_and_inputs_of_layers_are_those_of_the_model(make_small):
    folder = make_small("model")
    seen: dict[tuple[str, int], list[torch.Tensor]] = {}

    def on_part(part, layer, first_row, rows):
        parts = seen.setdefault((part, layer), [])
        assert first_row == sum(map(len, parts))
        parts.append(rows.clone())

    one = stream_one(folder, row_plan(TEXT), DETERMINISTIC, on_part)
    embedding = load_model(folder, EngineConfig(dtype="float32")).model.model.embed_tokens.weight
    whole = {key: torch.cat(parts) for key, parts in seen.items()}
    inputs, attention, mlp = ([whole[part, layer] for layer in range(3)] for part in ("input", "attention", "mlp"))
    assert max(layer for _, layer in whole) == 2
    assert torch.equal(inputs[0], embedding[row_plan(TEXT).ids])
    for layer in (0, 1):
        assert torch.equal(one.norms[layer], inputs[layer + 1].norm(dim=-1))
        # the sums are those of the run, bit for bit
        assert torch.equal(inputs[layer] + attention[layer] + mlp[layer], inputs[layer + 1])
    for layer in (1, 2):
        weights, ids = whole["routing_weights", layer], one.routing_ids[layer]
        scores = whole["router_logits", layer].sigmoid().gather(1, ids)
        torch.testing.assert_close(weights / weights.sum(-1, keepdim=True), scores / scores.sum(-1, keepdim=True))


def test_without_mtp_layer_there_is_no_mtp_state(make_small):
    one = streamed(make_small("plain", mtp=False))
    assert one.mtp_hidden_RD is None
    assert list(one.routing_ids) == [1, 2]


def test_an_mtp_layer_that_is_not_wanted_is_not_run(make_small):
    folder = make_small("model")
    one = streamed(folder, options=StreamOptions(deterministic=True, with_mtp=False))
    assert one.mtp_hidden_RD is None
    assert torch.equal(one.final_hidden_RD, streamed(folder).final_hidden_RD)


@pytest.mark.parametrize("workers", [1, 3])
def test_hidden_states_on_disk_change_no_bit(make_small, tmp_path, workers):
    folder = make_small("model")
    in_ram, scratch = streamed(folder), tmp_path / "scratch"
    scratch.mkdir()
    tight = StreamOptions(deterministic=True, scratch=scratch, workers=workers)
    least = stream_one(folder, row_plan(TEXT), tight).memory
    tight = StreamOptions(
        deterministic=True, scratch=scratch, workers=workers, max_memory=least.peak_bytes - least.hidden
    )
    on_disk = streamed(folder, options=tight)
    assert (in_ram.memory.scratch_bytes, on_disk.memory.scratch_bytes) == (0, 3 * 70 * 48 * 4)
    assert torch.equal(on_disk.final_hidden_RD, in_ram.final_hidden_RD)
    assert torch.equal(on_disk.mtp_hidden_RD, in_ram.mtp_hidden_RD)
    assert list(scratch.iterdir()) == []


def test_too_little_memory_is_refused_before_anything_is_read(make_small, monkeypatch):
    folder = make_small("model")
    memory = streamed(folder).memory
    monkeypatch.setattr(ModelLoader, "fetch", None)
    with pytest.raises(ResourceError, match=f"at least {memory.peak_bytes - memory.hidden} bytes"):
        streamed(folder, options=StreamOptions(deterministic=True, max_memory=memory.peak_bytes - memory.hidden - 1))
