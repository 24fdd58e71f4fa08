"""Two models layer by layer: against the models in memory, against transformers, and with faults planted in one."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from builders import random_tensors, small_config, write_checkpoint

from converters.config import Glm4MoeConfig
from converters.convert import ConvertOptions, plan_convert
from converters.errors import InputError, ResourceError
from converters.job import run
from converters.layout import Layout
from converters.pipeline import RunOptions
from converters.quantize import QuantizeOptions, plan_quantize
from converters.schema import Role, expand
from converters.shard.mapping import ParallelMapping
from converters.shard.plan import ShardOptions, plan_shard
from converters.source import open_source
from runtime.config import EngineConfig
from runtime.model.loader import ModelLoader, load_model
from runtime.model.mtp import draft_agreement
from runtime.streaming.options import LAYERS, LOGITS, StreamOptions
from runtime.verify.limits import PROFILES
from runtime.verify.metrics import score_tokens
from runtime.verify.report import Levels, build_report
from runtime.verify.results import LayerDifference, ModelComparison
from runtime.verify.streamed import compare_streamed, planned, stream_one
from runtime.verify.summary import summarize
from runtime.verify.tokens import EncodedText
from runtime.verify.windows import plan_windows

TINY = Path(__file__).parents[3] / "fixtures" / "tiny"
SCHEMA = expand(Glm4MoeConfig.from_hf(small_config()))
Tensors = dict[str, torch.Tensor]
Edit = Callable[[Tensors], None]
BAD = 17


def text(num_tokens: int = 70, *, context_length: int = 24, stride: int | None = None, vocab: int = 64) -> EncodedText:
    ids = torch.randint(vocab, (num_tokens,), generator=torch.Generator().manual_seed(4)).tolist()
    return EncodedText(tuple(ids), plan_windows(num_tokens, context_length=context_length, stride=stride))


TEXT = text()


def checkpoint(folder: Path, edit: Edit | None = None) -> Path:
    tensors = random_tensors(SCHEMA)
    if edit is not None:
        edit(tensors)
    return write_checkpoint(folder, tensors, small_config())


def compared(tmp_path: Path, edit: Edit | None, options: StreamOptions | None = None) -> ModelComparison:
    folders = checkpoint(tmp_path / "source"), checkpoint(tmp_path / "candidate", edit)
    return compare_streamed(*folders, TEXT, options or StreamOptions())


def expert_weight(layer: int, expert: int, name: str) -> str:
    return SCHEMA.tensor(Role.EXPERT, f"{name}.weight", layer, expert).name


def noise(tensors: Tensors) -> None:
    """Change every linear weight a little."""
    for tensor in SCHEMA.tensors.values():
        if tensor.spec.role in (Role.EXPERT, Role.ATTENTION, Role.SHARED_EXPERT, Role.DENSE_MLP):
            tensors[tensor.name] = tensors[tensor.name] * 1.01


def errors(layer: LayerDifference) -> tuple[float, ...]:
    return layer.attention.relative, layer.mlp.relative, layer.residual.relative


def quantized(tmp_path: Path, source: Path) -> Path:
    with open_source(source) as opened:
        run(plan_quantize(opened, QuantizeOptions(scheme="fp8")), tmp_path / "fp8", RunOptions(workers=1), float)
    return tmp_path / "fp8"


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("layout", [Layout.PACKED, Layout.FUSED])
def test_a_repacked_copy_differs_in_nothing(tmp_path, layout, deterministic):
    source = checkpoint(tmp_path / "source")
    with open_source(source) as opened:
        run(plan_convert(opened, ConvertOptions(layout=layout)), tmp_path / "copy", RunOptions(workers=1), float)
    found = compare_streamed(source, tmp_path / "copy", TEXT, StreamOptions(deterministic=deterministic))
    assert [(layer.layer, layer.is_mtp) for layer in found.layers] == [(0, False), (1, False), (2, False), (3, True)]
    for layer in found.layers:
        assert errors(layer) == (0.0, 0.0, 0.0)
        assert layer.mlp_norm is not None
        assert (layer.mlp_norm.relative, layer.first_non_finite) == (0.0, None)
        assert all(expert.relative in (0.0, None) for expert in layer.experts)
        for router in (layer.router, layer.router_own):
            assert (router is None) == (layer.layer == 0)
            assert router is None or (router.changed, router.logit_max_abs, router.load_shift) == (0.0, 0.0, 0.0)
    assert found.summary is not None
    assert found.mtp is not None
    assert (found.summary.kl_nats.max, found.mtp.summary.kl_nats.max) == (0.0, 0.0)


@torch.inference_mode()
def expected_logits(folder: Path, read: EncodedText) -> list[torch.Tensor]:
    model = load_model(folder, EngineConfig(dtype="float32")).model
    found = []
    for window in read.plan.windows:
        hidden = model(torch.tensor([read.token_ids[window.begin : window.end]]))[0]
        found.append(model.logits(hidden[window.logit_rows]))
    return found


@pytest.mark.parametrize("stride", [None, 9])
def test_deterministic_scores_are_those_of_the_models_in_memory(tmp_path, stride):
    read = text(stride=stride)
    folders = checkpoint(tmp_path / "source"), checkpoint(tmp_path / "candidate", noise)
    found = compare_streamed(*folders, read, StreamOptions(deterministic=True))
    both = zip(expected_logits(folders[0], read), expected_logits(folders[1], read), read.plan.windows, strict=True)
    start, windows = 0, []
    assert found.tokens is not None
    for ours, theirs, window in both:
        next_ids = torch.tensor(read.token_ids[window.first_scored : window.end])
        scores, rows = score_tokens(ours, theirs, next_ids), slice(start, start + len(next_ids))
        for name in ("kl_nats", "nll_reference", "nll_candidate", "logit_max_abs"):
            assert torch.equal(getattr(found.tokens.scores, name)[rows], getattr(scores, name)), name
        assert found.tokens.positions_T[rows].tolist() == list(range(window.first_scored, window.end))
        windows += [window.index] * len(next_ids)
        start = rows.stop
    assert found.tokens.windows_T.tolist() == windows
    assert found.summary == summarize(found.tokens.scores, found.tokens.windows_T, seed=0)


def test_fast_figures_are_close_to_deterministic_ones(tmp_path):
    exact, fast = (compared(tmp_path, noise, StreamOptions(deterministic=how)) for how in (True, False))
    for ours, theirs in zip(exact.layers, fast.layers, strict=True):
        assert errors(ours) == pytest.approx(errors(theirs), rel=1e-4)
    assert exact.summary is not None
    assert fast.summary is not None
    assert fast.summary.kl_nats.estimate.mean == pytest.approx(exact.summary.kl_nats.estimate.mean, rel=1e-4)


@pytest.mark.parametrize("fault", ["zeroed", "gate and up exchanged"])
def test_a_fault_in_one_expert_shows_there_and_nowhere_else(tmp_path, fault):
    gate, up = expert_weight(2, 1, "gate_proj"), expert_weight(2, 1, "up_proj")

    def plant(tensors: Tensors) -> None:
        if fault == "zeroed":
            tensors[gate] = torch.zeros_like(tensors[gate])
        else:
            tensors[gate], tensors[up] = tensors[up], tensors[gate]

    found = compared(tmp_path, plant)
    for layer in found.layers:
        forced = (layer.attention.relative, layer.mlp.relative)
        if layer.layer != 2:
            assert forced == (0.0, 0.0)
            assert all(expert.relative in (0.0, None) for expert in layer.experts)
            continue
        assert forced[0] == 0.0
        assert forced[1] > 10 * layer.mlp.floor_relative
        wrong = [expert.expert for expert in layer.experts if expert.relative]
        assert wrong == [1]
        assert layer.router is not None
        assert (layer.router.changed, layer.router.logit_max_abs) == (0.0, 0.0)
    # what is added up along the way starts there
    assert [layer.residual.relative > 0 for layer in found.layers] == [False, False, True, True]


def test_a_lost_bias_shows_in_the_router_alone(tmp_path):
    bias = SCHEMA.tensor(Role.ROUTER_BIAS, "gate.e_score_correction_bias", 1).name

    def plant(tensors: Tensors) -> None:
        tensors[bias] = torch.tensor([3.0, 0.0, 0.0, 0.0])

    found = compared(tmp_path, plant).layers[1]
    assert (found.attention.relative, found.mlp.relative) == (0.0, 0.0)
    assert found.router is not None
    assert found.router_own is not None
    assert found.router.unexplained > 0
    assert found.router.changed == found.router_own.changed > 0.1
    assert found.residual.relative > 0.01


def test_a_fault_in_the_norm_before_the_mlp_is_measured_by_itself(tmp_path):
    norm = SCHEMA.tensor(Role.NORM, "post_attention_layernorm.weight", 1).name

    def plant(tensors: Tensors) -> None:
        tensors[norm] = tensors[norm] * 1.25

    found = compared(tmp_path, plant).layers
    # 1.25 times a bf16 is rounded again
    assert [layer.mlp_norm.slope for layer in found] == pytest.approx([1.0, 1.25, 1.0, 1.0], rel=2**-9)
    assert [layer.mlp.relative for layer in found] == [0.0] * 4


@pytest.mark.parametrize("part", [(Role.MTP_PROJECTION, "eh_proj.weight"), (Role.ATTENTION, "o_proj.weight")])
def test_a_fault_in_the_mtp_layer_shows_there(tmp_path, part):
    name = SCHEMA.tensor(*part, 3).name

    def plant(tensors: Tensors) -> None:
        tensors[name] = tensors[name].flip(0)

    found = compared(tmp_path, plant)
    *main, mtp = found.layers
    assert all(errors(layer) == (0.0, 0.0, 0.0) for layer in main)
    assert mtp.attention.relative > 10 * mtp.attention.floor_relative
    assert found.summary is not None
    assert found.mtp is not None
    assert found.mtp.summary is not None
    assert (found.summary.kl_nats.max, found.mtp.summary.kl_nats.estimate.mean > 1e-3) == (0.0, True)


@pytest.mark.parametrize("deterministic", [True, False])
def test_acceptance_of_drafts_is_that_of_the_models_in_memory(tmp_path, deterministic):
    read = text(300, context_length=60, vocab=1024)
    candidate = quantized(tmp_path, TINY)
    found = compare_streamed(TINY, candidate, read, StreamOptions(levels={LOGITS}, deterministic=deterministic)).mtp
    assert found is not None
    for folder, share in ((TINY, found.acceptance_reference), (candidate, found.acceptance_candidate)):
        loaded, agreeing, count = load_model(folder, EngineConfig(dtype="float32")), 0, 0
        for window in read.plan.windows:
            ids = torch.tensor([read.token_ids[window.begin : window.end]])
            with torch.inference_mode():
                agreement = draft_agreement(loaded.model, loaded.mtp, ids)
            agreeing, count = agreeing + agreement.num_agreeing, count + agreement.num_positions
        assert share == pytest.approx(agreeing / count)
    # of each window of 60, the last token that is scored is predicted from the third last position
    assert found.summary is not None
    assert found.summary.num_tokens == 5 * 58


def test_kl_and_perplexity_equal_transformers(tmp_path):
    """The quantized candidate goes through transformers as the values that its codes stand for."""
    from transformers import Glm4MoeForCausalLM

    held_out = (TINY.parent / "tiny_heldout.txt").read_text()
    from tests.in_memory_comparison import LogitsOptions, encode_text

    read = encode_text(TINY, held_out, LogitsOptions(num_tokens=400, context_length=100))
    candidate, plain = quantized(tmp_path, TINY), tmp_path / "plain"
    with open_source(candidate) as opened:
        run(plan_convert(opened, ConvertOptions(dtype="float32", dequantize=True)), plain, RunOptions(workers=1), float)
    both = [
        Glm4MoeForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        for folder in (TINY, plain)
    ]
    kl, losses = 0.0, ([], [])
    for window in read.plan.windows:
        ids = torch.tensor([read.token_ids[window.begin : window.end]])
        with torch.inference_mode():
            logits = [model(ids).logits[0, :-1].double() for model in both]
        log_p, log_q = (values.log_softmax(-1) for values in logits)
        kl += F.kl_div(log_q, log_p, log_target=True, reduction="sum").item()
        for side, values in zip(losses, logits, strict=True):
            side.append(F.cross_entropy(values, ids[0, 1:], reduction="sum").item())
    summary = compare_streamed(TINY, candidate, read, StreamOptions(levels={LOGITS})).summary
    assert summary is not None
    count = summary.num_tokens
    assert count == 4 * 99
    assert summary.kl_nats.estimate.mean == pytest.approx(kl / count, rel=1e-5)
    assert summary.perplexity.reference == pytest.approx(math.exp(sum(losses[0]) / count), rel=1e-5)
    assert summary.perplexity.candidate == pytest.approx(math.exp(sum(losses[1]) / count), rel=1e-5)


def test_levels_decide_the_work(tmp_path, monkeypatch):
    whole = compared(tmp_path, noise)
    layers = compared(tmp_path, noise, StreamOptions(levels={LAYERS}))
    assert layers.layers == whole.layers
    assert (layers.tokens, layers.summary, layers.mtp, layers.floor) == (None, None, None, None)
    ran = []
    from runtime.streaming import layer as module

    run_expert = module.run_expert
    monkeypatch.setattr(module, "run_expert", lambda expert, given: ran.extend(given) or run_expert(expert, given))
    logits = compared(tmp_path, noise, StreamOptions(levels={LOGITS}, floor=False))
    without_layers, _ = len(ran), ran.clear()
    compared(tmp_path, noise, StreamOptions(levels={LAYERS}, floor=False))
    assert without_layers < len(ran)
    assert (logits.layers, logits.floor, logits.summary) == ((), None, whole.summary)


def test_the_floor_is_measured_on_whole_windows_and_leaves_the_rest_alone(tmp_path):
    few, many, none = (
        compared(tmp_path, noise, StreamOptions(floor_tokens=tokens, floor=tokens > 1)) for tokens in (2, 50, 1)
    )
    assert (few.floor.num_tokens, many.floor.num_tokens, none.floor) == (23, 46, None)
    assert 0 < few.floor.kl_mean < 0.1
    for ours, theirs in zip(few.layers, none.layers, strict=True):
        assert errors(ours) == errors(theirs)
        assert theirs.attention.floor_relative is theirs.residual.floor_relative is None
        # noise of 2^-9 in front comes out about as large
        assert 2**-11 < ours.attention.floor_relative < 2**-7
    # behind a layer the noise is 2^-9 of all that has been added up
    assert few.layers[0].residual.floor_relative == pytest.approx(2**-9, rel=1e-3)
    assert few.summary == none.summary


def poison(name: str, row: int | None = None) -> Edit:
    def plant(tensors: Tensors) -> None:
        if row is None:
            tensors[name].view(-1)[0] = torch.nan
        else:
            tensors[name][row] = torch.inf

    return plant


def test_nan_is_found_where_it_first_appears(tmp_path):
    loads = {expert.num_tokens: expert.expert for expert in compared(tmp_path, None).layers[2].experts}
    expert = loads[min(load for load in loads if load)]
    found = compared(tmp_path, poison(expert_weight(2, expert, "down_proj")))
    places = [layer.first_non_finite for layer in found.layers]
    assert places[:2] == [None, None]
    assert places[2].startswith(f"candidate: expert {expert}, token ")
    assert places[3].startswith("candidate, on its own states: input, token ")
    first = int(places[2].rpartition(" ")[2])
    assert found.tokens is not None
    assert found.summary is not None
    # what a token makes of it predicts the next one, and reaches back to no earlier one
    bad = found.tokens.positions_T[~found.tokens.scores.finite_candidate] - 1
    assert int(bad.min()) >= first
    assert 0 < found.summary.num_tokens < len(found.tokens.scores)


def test_nan_in_every_token_ends_nothing(tmp_path):
    q_proj = SCHEMA.tensor(Role.ATTENTION, "q_proj.weight", 0).name
    found = compared(tmp_path, poison(q_proj))
    assert found.layers[0].first_non_finite == "candidate: attention output, token 0"
    assert math.isnan(found.layers[0].residual.relative)
    assert found.summary is None
    assert found.layers[-1].first_non_finite is not None
    assert found.tokens is not None


def test_nan_is_found_without_layers_too(tmp_path):
    o_proj = SCHEMA.tensor(Role.ATTENTION, "o_proj.weight", 1).name
    found = compared(tmp_path, poison(o_proj), StreamOptions(levels=frozenset({LOGITS})))
    assert (found.layers, found.first_non_finite) == ((), ("candidate: layer 1, attention output, token 0",))
    assert compared(tmp_path / "sound", None, StreamOptions(levels=frozenset({LOGITS}))).first_non_finite == ()


def scale_norm(tensors: Tensors) -> None:
    name = SCHEMA.tensor(Role.NORM, "post_attention_layernorm.weight", 1).name
    tensors[name] = tensors[name] * 2


@pytest.mark.parametrize("kind", ["identity", "cast", "nvfp4"])
def test_faulty_norm_before_the_mlp_fails_and_nothing_else_does(tmp_path, kind):
    found = compared(tmp_path, scale_norm, StreamOptions(levels=frozenset({LAYERS})))
    report = build_report((tmp_path, tmp_path), kind, Levels(layers=found), PROFILES[kind])
    (reason,) = report.reasons
    assert reason.startswith("layer 1 norm before the MLP: relative error 1, 1 at token ")
    assert (report.verdict, report.wrong_layers, report.first_off) == ("fail", (1,), 1)


@pytest.mark.parametrize(("factor", "verdict"), [(2.5, "pass"), (2.4, "fail"), (1.0, "fail")])
def test_wrong_scaling_factor_moves_routing_weight_and_nothing_else(tmp_path, factor, verdict):
    """All weights times f move |f - 1| / 2 of their sum."""
    folders = checkpoint(tmp_path / "source"), checkpoint(tmp_path / "candidate")
    config = json.loads((folders[1] / "config.json").read_text())
    for folder, value in zip(folders, (2.5, factor), strict=True):
        (folder / "config.json").write_text(json.dumps({**config, "routed_scaling_factor": value}))
    found = compare_streamed(*folders, TEXT, StreamOptions(levels=frozenset({LAYERS})))
    moved = [layer.router.weight_moved for layer in found.layers if layer.router is not None]
    assert moved == [pytest.approx(abs(factor / 2.5 - 1) / 2, abs=1e-6)] * 3
    report = build_report((tmp_path, tmp_path), "fp8", Levels(layers=found), PROFILES["fp8"])
    assert report.verdict == verdict
    assert all(" router: share of the routing weight moved " in reason for reason in report.reasons)
    assert len(report.reasons) == (3 if verdict == "fail" else 0)


@pytest.mark.parametrize("scheme", ["", "fp8"])
def test_checkpoints_cut_for_ranks_are_the_models_they_were(tmp_path, scheme):
    """Embedding and head lie by rows on several ranks, output projections by columns."""
    source = checkpoint(tmp_path / "source")
    whole = quantized(tmp_path, source) if scheme else source
    with open_source(whole) as opened:
        options = ShardOptions(mapping=ParallelMapping(tp=2, ep=2))
        run(plan_shard(opened, options), tmp_path / "cut", RunOptions(workers=1), float)
    found = compare_streamed(whole, tmp_path / "cut", TEXT, StreamOptions(deterministic=True, floor=False))
    assert {errors(layer) for layer in found.layers} == {(0.0, 0.0, 0.0)}
    assert found.summary is not None
    assert found.summary.kl_nats.max == 0.0
    ours, theirs = (stream_one(folder, TEXT, StreamOptions()) for folder in (whole, tmp_path / "cut"))
    assert torch.equal(ours.final_hidden_RD, theirs.final_hidden_RD)


def test_a_broken_reference_is_named_as_such(tmp_path):
    q_proj = SCHEMA.tensor(Role.ATTENTION, "o_proj.weight", 1).name
    folders = checkpoint(tmp_path / "source", poison(q_proj)), checkpoint(tmp_path / "candidate")
    found = compare_streamed(*folders, TEXT, StreamOptions())
    assert [layer.first_non_finite for layer in found.layers][:2] == [None, "reference: attention output, token 0"]


def test_worst_tokens_are_counted_in_the_text_where_windows_overlap(tmp_path):
    """The embedding of one token is off; it occurs once, late in the text."""
    ids = [*range(40), 63, *range(20)]
    read = EncodedText(tuple(ids), plan_windows(len(ids), context_length=16, stride=4))

    def plant(tensors: Tensors) -> None:
        tensors[SCHEMA.tensor(Role.EMBEDDING, "embed_tokens.weight").name][63] *= -1

    folders = checkpoint(tmp_path / "source"), checkpoint(tmp_path / "candidate", plant)
    found = compare_streamed(*folders, read, StreamOptions(levels={LAYERS}, floor=False))
    assert found.layers[0].residual.worst_token == 40


def test_hidden_states_on_disk_and_several_readers_change_nothing(tmp_path):
    folders = checkpoint(tmp_path / "source"), checkpoint(tmp_path / "candidate", noise)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    plain = compare_streamed(*folders, TEXT, StreamOptions())
    options = StreamOptions(scratch=scratch, workers=3)
    with planned(*folders, TEXT, options) as job:
        least = job.memory.peak_bytes - job.memory.hidden
    with planned(*folders, TEXT, replace(options, max_memory=least)) as job:
        assert (job.memory.hidden_on_disk, job.memory.scratch_bytes) == (True, job.memory.hidden)
        on_disk = job.run()
    assert list(scratch.iterdir()) == []
    assert (on_disk.layers, on_disk.summary, on_disk.mtp) == (plain.layers, plain.summary, plain.mtp)
    with pytest.raises(ResourceError), planned(*folders, TEXT, replace(options, max_memory=least - 1)):
        pass


class Counter:
    def __init__(self) -> None:
        self.bytes, self.texts = 0, list[str]()

    def advance(self, num_bytes: int) -> None:
        self.bytes += num_bytes

    def describe(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize("levels", [{LAYERS}, {LOGITS}, {LAYERS, LOGITS}])
def test_each_checkpoint_is_read_once_and_progress_ends_at_all(tmp_path, levels):
    folders = checkpoint(tmp_path / "source"), checkpoint(tmp_path / "candidate", noise)
    progress = Counter()
    with planned(*folders, TEXT, StreamOptions(levels=frozenset(levels))) as job:
        found = job.run(progress)
        assert progress.bytes == job.read_bytes
    assert progress.texts[0] == "layer 1/4"
    assert found.spent is not None
    assert found.spent.seconds >= found.spent.seconds_waiting >= 0
    # and the rows of the embedding
    assert 0 <= found.spent.bytes_read - progress.bytes < 2 * 2 * 64 * 48 * 2 * 4


def test_equal_heads_are_held_once(tmp_path, monkeypatch):
    fetched, head = [], SCHEMA.tensor(Role.HEAD, "lm_head.weight").name
    fetch = ModelLoader.fetch

    def listed(self, names, **how):
        fetched.extend(name for name in names if name == head)
        return fetch(self, names, **how)

    monkeypatch.setattr(ModelLoader, "fetch", listed)
    compared(tmp_path, noise)
    assert fetched == [head]

    def nudge(tensors: Tensors) -> None:
        tensors[head][5, 5] += 0.25

    fetched.clear()
    found = compared(tmp_path, nudge)
    assert fetched == [head, head]
    assert found.summary is not None
    assert found.summary.logit_max_abs > 0


def test_an_unreadable_weight_surfaces(tmp_path):
    folders = checkpoint(tmp_path / "source"), checkpoint(tmp_path / "candidate")
    with planned(*folders, TEXT, StreamOptions()) as job:
        shard = sorted(folders[1].glob("*.safetensors"))[1]
        with shard.open("rb+") as file:
            file.truncate(shard.stat().st_size - 1000)
        with pytest.raises(InputError, match="the end of the file"):
            job.run()


def test_a_candidate_without_mtp_layer_is_compared_without_it(tmp_path):
    config = small_config(num_nextn_predict_layers=0)
    tensors = random_tensors(expand(Glm4MoeConfig.from_hf(config), mtp=False))
    candidate = write_checkpoint(tmp_path / "candidate", tensors, config)
    found = compare_streamed(checkpoint(tmp_path / "source"), candidate, TEXT, StreamOptions())
    assert [layer.is_mtp for layer in found.layers] == [False] * 3
    assert found.mtp is None
    assert any("candidate has no MTP layer" in note for note in found.notes)


@pytest.mark.parametrize(("field", "value"), [("hidden_size", 64), ("first_k_dense_replace", 2), ("vocab_size", 72)])
def test_models_that_do_not_correspond_are_refused(tmp_path, field, value):
    source, config = checkpoint(tmp_path / "source"), small_config(**{field: value})
    other = write_checkpoint(tmp_path / "candidate", random_tensors(expand(Glm4MoeConfig.from_hf(config))), config)
    with pytest.raises(InputError) as caught:
        compare_streamed(source, other, TEXT, StreamOptions())
    assert caught.value.subject == f"{other / 'config.json'}: {field}"


def test_another_factor_in_the_config_shows_in_every_moe_layer(tmp_path):
    candidate = checkpoint(tmp_path / "candidate")
    config = json.loads((candidate / "config.json").read_text())
    (candidate / "config.json").write_text(json.dumps(config | {"routed_scaling_factor": 1.0}))
    found = compare_streamed(checkpoint(tmp_path / "source"), candidate, TEXT, StreamOptions(levels={LAYERS}))
    # with the reference's routing, its weights included, the block is right: the router is what is wrong
    assert [layer.mlp.relative for layer in found.layers] == [0.0] * 4
    assert [layer.router and round(layer.router.weight_moved, 6) for layer in found.layers] == [None, 0.3, 0.3, 0.3]
