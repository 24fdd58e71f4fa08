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
from safetensors.torch import load_file, save_file

from converters.config import Glm4MoeConfig
from converters.errors import Glm4MoeError, InputError, ResourceError, UsageError
from converters.schema import Role, expand
from runtime.config import EngineConfig
from runtime.model.loader import load_model
from runtime.streaming.options import LAYERS, LOGITS, StreamOptions
from runtime.verify.limits import PROFILES
from runtime.verify.metrics import TokenScores
from runtime.verify.reference import check_reference, compare_reference, scoring_bytes
from runtime.verify.replayed import planned_replay
from runtime.verify.report import Levels, build_report
from runtime.verify.results import ModelComparison
from runtime.verify.store import StoredReference, save_reference
from runtime.verify.store_layout import METRIC_VERSION, ModelRun, OnPart, RunOptions
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


def run(
    folder: Path, text: EncodedText, options: RunOptions, on_part: OnPart | None = None, *, behind: int | None = None
) -> ModelRun:
    assert isinstance(options, StreamOptions)
    found = stream_one(folder, text, options, on_part, behind=behind)
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
        layer.self_attn.register_forward_hook(lambda *call, index=index: told.__setitem__(index, call[-1][0]))
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
        kept = stored.layers(EngineConfig(dtype="float32"))
        embedding = model.model.embed_tokens.weight
        assert torch.equal(kept.embedded(32, 64), embedding[torch.tensor(TOKEN_IDS[32:64])])
        for layer, output in told.items():
            torch.testing.assert_close(kept.attention(layer, 32, 64), output, rtol=1e-5, atol=1e-5)
            module = model.decoder_layers[layer]
            assert torch.equal(kept.mlp_norm(layer).weight, module.post_attention_layernorm.weight)
            assert kept.mlp_norm(layer).eps == module.post_attention_layernorm.eps
        states = kept.embedded(32, 64) + kept.attention(0, 32, 64) + kept.mlp(0, 32, 64)
        torch.testing.assert_close(stored.norms(0)[32:64], states.norm(dim=-1), rtol=1e-5, atol=0)
        routing = kept.routing(1, 32, 64)
        assert torch.equal(routing.topk_ids_TK, stored.routing_ids()[1][32:64])
        scores = routing.router_logits_TE.sigmoid() + kept.bias(1)
        assert torch.equal(scores.topk(2).indices, routing.topk_ids_TK)


def test_the_file_is_safetensors_and_appears_only_when_complete(source, path):
    met: list[list[str]] = []

    def watched(*args: object, **how: object) -> ModelRun:
        met.append(sorted(entry.name for entry in path.parent.glob("*.safetensors")))
        return run(*args, **how)

    save_reference(path, source, text(), OPTIONS, watched)
    assert met == [[]]
    with safe_open(path, "pt") as file:
        assert file.get_tensor("token_ids").tolist() == list(TOKEN_IDS)
        assert file.get_tensor("final_hidden").dtype is torch.float32
    first = path.read_bytes()
    save_reference(path, source, text(), OPTIONS, run)
    assert path.read_bytes() == first


def test_a_run_that_fails_leaves_nothing(source, path):
    def failing(*_: object, **__: object) -> ModelRun:
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


WITH_LAYERS = replace(OPTIONS, levels=frozenset({LAYERS, LOGITS}))


def replayed(path: Path, candidate: Path, options: StreamOptions = WITH_LAYERS) -> ModelComparison:
    with StoredReference.open(path) as stored, planned_replay(stored, candidate, options) as job:
        return job.run().models


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("length", [32, 8], ids=["one chunk", "windows"])
def test_layers_beside_a_reference_have_the_figures_of_the_source(source, candidate, path, deterministic, length):
    options = replace(WITH_LAYERS, deterministic=deterministic)
    save_reference(path, source, text(length=length), options, run, with_inputs=True)
    found = replayed(path, candidate, options)
    direct = compare_streamed(source, candidate, text(length=length), options)
    assert [replace(layer, experts=()) for layer in direct.layers] == list(found.layers)
    assert [len(layer.experts) for layer in direct.layers] == [0, 4, 4]
    assert found.ends == direct.ends
    assert found.summary == direct.summary
    assert max(layer.mlp.relative for layer in found.layers) > 1


def test_layers_beside_a_reference_in_chunks_of_a_window(source, candidate, path, monkeypatch):
    monkeypatch.setattr("runtime.streaming.layer.CHUNK_TOKENS", 9)
    save_reference(path, source, text(), OPTIONS, run, with_inputs=True)
    direct = compare_streamed(source, candidate, text(), WITH_LAYERS)
    assert [replace(layer, experts=()) for layer in direct.layers] == list(replayed(path, candidate).layers)


def test_layers_alone_beside_a_reference_score_no_predictions(source, path):
    save_reference(path, source, text(), OPTIONS, run, with_inputs=True)
    found = replayed(path, source, replace(OPTIONS, levels=frozenset({LAYERS})))
    assert (found.tokens, found.summary, len(found.layers)) == (None, None, 3)
    assert {layer.mlp.relative for layer in found.layers} == {layer.attention.relative for layer in found.layers} == {0}


@pytest.mark.parametrize(
    ("role", "part"),
    [
        (Role.EMBEDDING, "embedding"),
        (Role.HEAD, "head"),
        (Role.SHARED_EXPERT, "layer 1 MoE"),
        (Role.ROUTER, "layer 1 router"),
    ],
)
def test_a_fault_is_named_beside_a_reference_as_beside_its_source(source, tmp_path, path, role, part):
    candidate = damaged(tmp_path / "candidate", source, role)
    options = replace(OPTIONS, levels=frozenset({LAYERS}))
    save_reference(path, source, text(), OPTIONS, run, with_inputs=True, with_head=True)
    for found in (replayed(path, candidate, options), compare_streamed(source, candidate, text(), options)):
        report = build_report((source, candidate), "cast", Levels(layers=found), PROFILES["cast"])
        assert report.verdict == "fail"
        assert report.reasons[0].startswith(part)
        scaled = {Role.EMBEDDING: found.ends.embedding, Role.HEAD: found.ends.head}
        # four times a value is three times itself away from it
        assert [error.relative for name, error in scaled.items() if name is role] in ([], [pytest.approx(3)])


def test_a_final_norm_that_is_off_is_named(source, tmp_path, path):
    tensors = read_tensors(source)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.02
    candidate = write_checkpoint(tmp_path / "candidate", tensors, small_config())
    options = replace(OPTIONS, levels=frozenset({LAYERS}))
    save_reference(path, source, text(), OPTIONS, run, with_inputs=True)
    for found in (replayed(path, candidate, options), compare_streamed(source, candidate, text(), options)):
        report = build_report((source, candidate), "fp8", Levels(layers=found), PROFILES["fp8"])
        (reason,) = report.reasons
        assert reason.startswith("final norm: relative error 0.02")


def test_layers_that_were_not_kept_are_refused_by_name(source, candidate, path):
    save_reference(path, source, text(), OPTIONS, run)
    with pytest.raises(UsageError) as caught:
        replayed(path, candidate)
    assert str(caught.value) == (
        f"--reference {path}: expected one with its layers, to compare layers with, found one without. "
        "Save it again with --save-inputs, or take --level logits."
    )


@pytest.mark.parametrize("name", ["mlp.1", "router_bias.2", "norm_eps"])
def test_layers_that_are_damaged_are_refused_by_name(source, candidate, path, name):
    save_reference(path, source, text(), OPTIONS, run, with_inputs=True)
    tensors = load_file(path)
    tensors[name] = tensors[name][:0].clone()
    save_file(tensors, path)
    with pytest.raises(InputError, match=f"{name}: expected F"):
        replayed(path, candidate)


def test_a_head_that_is_nowhere_is_missed_before_the_run(source, tmp_path, path, monkeypatch):
    candidate = damaged(tmp_path / "candidate", source, Role.HEAD)
    save_reference(path, source, text(), OPTIONS, run, with_inputs=True)
    monkeypatch.setattr("runtime.verify.replayed.Stream", None)
    with pytest.raises(InputError, match="expected the head of the reference"):
        replayed(path, candidate)


def test_a_nan_beside_kept_layers_is_placed(source, tmp_path, path):
    candidate = damaged(tmp_path / "candidate", source, Role.SHARED_EXPERT, math.nan)
    save_reference(path, source, text(), OPTIONS, run, with_inputs=True)
    first = next(layer for layer in replayed(path, candidate).layers if layer.first_non_finite)
    assert (first.layer, first.first_non_finite) == (1, "candidate: MLP output, token 0")


def test_a_head_beside_the_candidates_own_is_in_the_plan(source, candidate, path):
    heads, alone = [], []
    for with_head, at_hand in ((False, None), (True, None), (False, source)):
        save_reference(path, source, text(), OPTIONS, run, with_inputs=True, with_head=with_head)
        with StoredReference.open(path) as stored, planned_replay(stored, candidate, OPTIONS, source=at_hand) as job:
            heads.append(job.memory.head)
            alone.append(scoring_bytes(stored, at_hand, OPTIONS))
    head_bytes, hidden_bytes = read_tensors(source)[HEAD_NAME].nbytes, len(TOKEN_IDS) * 48 * 4
    assert [head - heads[0] for head in heads[1:]] == [head_bytes] * 2
    assert alone == [hidden_bytes, hidden_bytes + head_bytes, hidden_bytes + head_bytes]


@pytest.mark.parametrize("levels", [{LAYERS}, {LAYERS, LOGITS}], ids=["layers", "both"])
def test_hidden_states_beside_kept_layers_may_lie_on_disk(source, candidate, path, levels):
    save_reference(path, source, text(), OPTIONS, run, with_inputs=True)
    options = replace(OPTIONS, levels=frozenset(levels))
    with StoredReference.open(path) as stored:
        with planned_replay(stored, candidate, options) as job:
            peak = job.memory.peak_bytes
        with planned_replay(stored, candidate, replace(options, max_memory=peak - 1)) as job:
            assert job.memory.hidden_on_disk
            found, expected = job.run().models, replayed(path, candidate, options)
    assert (found.layers, found.ends, found.summary) == (expected.layers, expected.ends, expected.summary)
