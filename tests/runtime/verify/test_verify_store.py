"""A stored reference says what its model said: the same figures as a direct comparison, or a refusal."""

import json
import math
import struct
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from builders import read_tensors, small_checkpoint, small_config, write_checkpoint
from safetensors import safe_open

from converters.config import Glm4MoeConfig
from converters.errors import Glm4MoeError, InputError, ResourceError, UsageError
from converters.schema import Role, expand
from runtime.config import EngineConfig
from runtime.model.loader import load_model
from runtime.streaming.options import LAYERS, LOGITS, StreamOptions
from runtime.verify.metrics import TokenScores
from runtime.verify.reference import check_reference, compare_reference
from runtime.verify.store import StoredReference, save_reference
from runtime.verify.store_layout import METRIC_VERSION, ModelRun, OnInput, RunOptions
from runtime.verify.streamed import compare_streamed, stream_one
from runtime.verify.tokens import EncodedText
from runtime.verify.windows import plan_windows
from tests.in_memory_comparison import LogitsOptions, compare_logits, run_in_memory

TOKEN_IDS = tuple(torch.randint(64, (90,), generator=torch.Generator().manual_seed(4)).tolist())
OPTIONS = StreamOptions(levels=frozenset({LOGITS}), floor=False, with_mtp=False)
SCHEMA = expand(Glm4MoeConfig.from_hf(small_config()))
(HEAD_NAME,) = (name for name, tensor in SCHEMA.tensors.items() if tensor.spec.role is Role.HEAD)


def text(stride: int | None = None, length: int = 32) -> EncodedText:
    return EncodedText(TOKEN_IDS, plan_windows(len(TOKEN_IDS), context_length=length, stride=stride))


def run(folder: Path, text: EncodedText, options: RunOptions, on_input: OnInput | None = None) -> ModelRun:
    assert isinstance(options, StreamOptions)
    found = stream_one(folder, text, options, on_input)
    return ModelRun(found.final_hidden_RD, found.routing_ids, found.norms)


def damaged(folder: Path, source: Path, role: Role, factor: float = 4) -> Path:
    """Return a copy whose tensors of a role are larger."""
    tensors = read_tensors(source)
    for name, tensor in SCHEMA.tensors.items():
        if tensor.spec.role is role:
            tensors[name] = tensors[name] * factor
    return write_checkpoint(folder, tensors, small_config())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return small_checkpoint(tmp_path / "source")


@pytest.fixture
def candidate(tmp_path: Path, source: Path) -> Path:
    return damaged(tmp_path / "candidate", source, Role.EXPERT)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "reference.safetensors"


def same_scores(left: TokenScores, right: TokenScores) -> bool:
    names = [field.name for field in fields(TokenScores)]
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in names)


@pytest.mark.parametrize("stride", [None, 8], ids=["disjoint", "overlapping"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
def test_through_the_store_every_score_is_the_direct_one(source, candidate, path, stride, deterministic):
    options = replace(OPTIONS, deterministic=deterministic)
    save_reference(path, source, text(stride), options, run)
    with StoredReference.open(path) as stored:
        found = compare_reference(stored, candidate, options, run)
    direct = compare_streamed(source, candidate, text(stride), options)
    assert found.models.tokens is not None
    assert direct.tokens is not None
    assert same_scores(found.models.tokens.scores, direct.tokens.scores)
    assert torch.equal(found.models.tokens.positions_T, direct.tokens.positions_T)
    assert found.models.summary == direct.summary
    assert found.models.protocol == direct.protocol
    assert direct.summary is not None
    assert direct.summary.kl_nats.estimate.mean > 1e-4


def test_the_store_serves_a_deterministic_comparison_with_layers_too(source, candidate, path):
    options = replace(OPTIONS, deterministic=True)
    save_reference(path, source, text(), options, run)
    with StoredReference.open(path) as stored:
        found = compare_reference(stored, candidate, options, run)
    everything = replace(options, levels=frozenset({LAYERS, LOGITS}), floor=True, with_mtp=True)
    assert compare_streamed(source, candidate, text(), everything).summary == found.models.summary


def test_nan_of_the_candidate_is_placed_by_its_norms(source, tmp_path, path):
    candidate = damaged(tmp_path / "candidate", source, Role.SHARED_EXPERT, math.nan)
    save_reference(path, source, text(), OPTIONS, run)
    with StoredReference.open(path) as stored:
        found = compare_reference(stored, candidate, OPTIONS, run).models
    assert found.first_non_finite == ("candidate: layer 1, hidden state, token 0",)
    assert found.summary is None


def test_routing_agreement_is_that_of_the_models_in_memory(source, tmp_path, path):
    candidate = damaged(tmp_path / "candidate", source, Role.ROUTER_BIAS, -4)
    options = replace(OPTIONS, deterministic=True)
    save_reference(path, source, text(8), options, run_in_memory)
    with StoredReference.open(path) as stored:
        found = compare_reference(stored, candidate, options, run_in_memory)
    direct = compare_logits(source, candidate, text(8), LogitsOptions(), lambda _: None)
    assert found.routing == direct.routing
    assert any(row.changed for row in found.routing)
    assert found.models.summary == direct.summary


def test_what_is_stored_is_what_the_model_says(source, path):
    facts = save_reference(path, source, text(), OPTIONS, run, with_inputs=True)
    model = load_model(source, EngineConfig(dtype="float32"), with_mtp=False).model
    told: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(model.decoder_layers):
        layer.register_forward_pre_hook(lambda _, inputs, index=index: told.__setitem__(index, inputs[0][0]))
    with StoredReference.open(path) as stored:
        assert stored.text == text()
        assert stored.facts == facts
        hidden = model(torch.tensor([TOKEN_IDS[32:64]]))[0]
        torch.testing.assert_close(stored.hidden(32, 64), hidden, rtol=1e-5, atol=1e-5)
        log_p = model.logits(hidden)[:-1].double().log_softmax(-1)
        expected = -log_p.gather(1, torch.tensor(TOKEN_IDS[33:64])[:, None])[:, 0]
        torch.testing.assert_close(stored.nll()[31:62], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            stored.log_z()[31:62], model.logits(hidden)[:-1].double().logsumexp(-1), rtol=0, atol=1e-5
        )
        ids, logprobs = stored.top()
        assert torch.equal(ids[31:62, 0].long(), log_p.argmax(-1))
        torch.testing.assert_close(logprobs[31:62].exp().sum(-1), torch.ones(31), rtol=0, atol=1e-5)
        assert {layer: ids.shape for layer, ids in stored.routing_ids().items()} == {1: (90, 2), 2: (90, 2)}
        assert stored.has_inputs
        for layer, inputs in told.items():
            assert torch.equal(stored.layer_input(layer, 32, 64)[0], inputs[0].bfloat16())
            assert len(stored.norms(layer)) == 90
        torch.testing.assert_close(stored.norms(0)[32:64], told[1].norm(dim=-1), rtol=1e-5, atol=0)


def test_the_file_is_safetensors_and_appears_only_when_complete(source, path):
    met: list[list[str]] = []

    def watched(*args: object) -> ModelRun:
        met.append(sorted(entry.name for entry in path.parent.glob("*.safetensors")))
        return run(*args)

    save_reference(path, source, text(), OPTIONS, watched)
    assert met == [[]]
    with safe_open(path, "pt") as file:
        assert file.get_tensor("token_ids").tolist() == list(TOKEN_IDS)
        assert file.get_tensor("final_hidden").dtype is torch.float32
    first = path.read_bytes()
    save_reference(path, source, text(), OPTIONS, run)
    assert path.read_bytes() == first


def test_a_run_that_fails_leaves_nothing(source, path):
    def failing(*_: object) -> ModelRun:
        raise ResourceError("memory")

    with pytest.raises(ResourceError):
        save_reference(path, source, text(), OPTIONS, failing)
    assert [entry.name for entry in path.parent.iterdir()] == ["source"]


@pytest.mark.parametrize("kept", [True, False])
def test_another_head_needs_the_references_own(source, tmp_path, path, kept):
    other = damaged(tmp_path / "other", source, Role.HEAD)
    save_reference(path, source, text(), OPTIONS, run, with_head=kept)
    direct = compare_streamed(source, other, text(), OPTIONS).summary
    with StoredReference.open(path) as stored:
        if kept:
            assert compare_reference(stored, other, OPTIONS, run).models.summary == direct
            return
        with pytest.raises(InputError, match="the head of the reference, digest .* Save the reference with its head"):
            compare_reference(stored, other, OPTIONS, run)
        assert compare_reference(stored, other, OPTIONS, run, source=source).models.summary == direct


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_kept_head_takes_two_bytes_a_value_where_that_is_exact(source, tmp_path, path, dtype):
    tensors = read_tensors(source)
    # the last bit of fp32 is none of bf16
    tensors[HEAD_NAME] = tensors[HEAD_NAME].to(dtype) * torch.tensor(1 + 2**-20, dtype=dtype)
    folder = write_checkpoint(tmp_path / "own", tensors, small_config())
    save_reference(path, folder, text(), OPTIONS, run, with_head=True)
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("head"), tensors[HEAD_NAME])


def change_config(folder: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("how", "subject"),
    [
        ("dtype", "dtype"),
        ("activations", "activations"),
        ("text", "--reference"),
        ("vocab", "vocab_size"),
        ("experts", "n_routed_experts"),
        ("source", "--reference"),
    ],
)
def test_what_does_not_belong_together_is_refused(source, candidate, path, how, subject):
    save_reference(path, source, text(), OPTIONS, run)
    options, asked, given = OPTIONS, None, None
    match how:
        case "dtype":
            options = replace(OPTIONS, dtype="bfloat16")
        case "activations":
            options = replace(OPTIONS, activations="as-served")
        case "text":
            asked = text(length=16)
        case "vocab":
            change_config(candidate, vocab_size=128)
        case "experts":
            change_config(candidate, n_routed_experts=8)
        case "source":
            given = change_config(source, rope_theta=12345)
    error = UsageError if how in ("dtype", "activations", "text") else InputError
    with StoredReference.open(path) as stored, pytest.raises(error) as caught:
        check_reference(stored, candidate, options, text=asked, source=given)
    assert subject in caught.value.subject
    assert caught.value.next_step


def test_the_right_text_and_source_are_accepted(source, candidate, path):
    save_reference(path, source, text(), OPTIONS, run)
    with StoredReference.open(path) as stored:
        check_reference(stored, candidate, OPTIONS, text=text(), source=source)


def edit_about(path: Path, edit: Callable[[dict[str, object]], None]) -> None:
    """Change the facts of a file in place; they keep their length by spaces."""
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    begin, end = json.loads(raw[8 : 8 + length])["about"]["data_offsets"]
    place = slice(8 + length + begin, 8 + length + end)
    facts = json.loads(bytes(raw[place]))
    edit(facts)
    data = json.dumps(facts).encode()
    raw[place] = data.ljust(end - begin)[: end - begin]
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("metric_version", METRIC_VERSION + 1, "figures of version"),
        ("schema", "other/1", "a reference of the form"),
        ("device", 12, "all facts of a reference, found device"),
        ("vocab_size", 20, "windows of its tokens"),
        ("tokens_digest", "0" * 64, "of its own tokens"),
        ("hidden_size", 7, "hidden states"),
        ("plan", {}, "windows of its tokens"),
    ],
)
def test_other_facts_are_refused(source, path, key, value, words):
    save_reference(path, source, text(), OPTIONS, run)
    edit_about(path, lambda facts: facts.__setitem__(key, value))
    with pytest.raises(InputError, match=words):
        StoredReference.open(path)


def test_a_kept_head_with_another_value_is_refused(source, tmp_path, path):
    save_reference(path, source, text(), OPTIONS, run, with_head=True)
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    begin, _ = json.loads(raw[8 : 8 + length])["head"]["data_offsets"]
    raw[8 + length + begin] ^= 1
    path.write_bytes(raw)
    with StoredReference.open(path) as stored, pytest.raises(InputError, match="head of its own digest"):
        compare_reference(stored, damaged(tmp_path / "other", source, Role.HEAD), OPTIONS, run)


@pytest.mark.parametrize("size", [0, 7, 100, 5000])
def test_a_file_that_was_cut_off_is_refused(source, path, size):
    save_reference(path, source, text(), OPTIONS, run)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(Glm4MoeError, match=path.name):
        StoredReference.open(path)


def test_another_safetensors_file_is_refused(source):
    file = next(source.glob("*.safetensors"))
    with pytest.raises(InputError, match="another safetensors file"):
        StoredReference.open(file)
