"""Two models on the same tokens: against torch's own losses, and with defects planted in one of them."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from builders import random_tensors, small_checkpoint, small_config, write_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from converters.config import Glm4MoeConfig
from converters.errors import InputError, UsageError
from converters.schema import Role, expand
from runtime.config import EngineConfig
from runtime.model.loader import load_model
from runtime.verify.windows import Window, plan_windows
from tests import in_memory_comparison as compare
from tests.in_memory_comparison import EncodedText, LogitsComparison, LogitsOptions, compare_logits, encode_text

NUM_TOKENS = 90
OPTIONS = LogitsOptions(context_length=32)
TOKEN_IDS = tuple(torch.randint(64, (NUM_TOKENS,), generator=torch.Generator().manual_seed(4)).tolist())
SCHEMA = expand(Glm4MoeConfig.from_hf(small_config()))
Edit = Callable[[dict[str, torch.Tensor]], None]


def no_edit(tensors: dict[str, torch.Tensor]) -> None:
    """Leave a checkpoint as it is."""


def checkpoint(folder: Path, edit: Edit = no_edit) -> Path:
    tensors = random_tensors(SCHEMA)
    edit(tensors)
    return write_checkpoint(folder, tensors, small_config())


def text(options: LogitsOptions = OPTIONS) -> EncodedText:
    plan = plan_windows(NUM_TOKENS, context_length=options.context_length, stride=options.stride)
    return EncodedText(TOKEN_IDS, plan)


def ignore(_: Window) -> None:
    """Nobody watches."""


def compared(tmp_path: Path, edit: Edit, options: LogitsOptions = OPTIONS) -> LogitsComparison:
    folders = checkpoint(tmp_path / "source"), checkpoint(tmp_path / "candidate", edit)
    return compare_logits(*folders, text(options), options, ignore)


def scale_weights(tensors: dict[str, torch.Tensor]) -> None:
    for tensor in SCHEMA.tensors.values():
        if tensor.spec.role is Role.EXPERT:
            tensors[tensor.name] = tensors[tensor.name] * 2


def test_checkpoint_against_itself_is_zero_in_every_metric(tmp_path: Path) -> None:
    result = compared(tmp_path, no_edit)
    summary = result.summary
    assert summary is not None
    assert (summary.kl_nats.estimate.mean, summary.kl_nats.max, summary.kl_nats.num_negative) == (0.0, 0.0, 0)
    assert (summary.top1.mean, summary.top5_overlap.mean, summary.perplexity.ratio) == (1.0, 1.0, 1.0)
    assert (summary.logit_max_abs, summary.delta_p_rms) == (0.0, 0.0)
    assert [(row.layer, row.overlap, row.changed) for row in result.routing] == [(1, 1.0, 0.0), (2, 1.0, 0.0)]
    assert result.non_finite == ()
    # windows of 32, 32 and 26 tokens, the first of each unscored
    assert (result.num_scored, summary.num_tokens, summary.num_windows) == (87, 87, 3)


def test_kl_and_perplexity_equal_torch_on_whole_windows(tmp_path: Path) -> None:
    result = compared(tmp_path, scale_weights)
    engine = EngineConfig(dtype="float32")
    kl, losses = 0.0, []
    both = [load_model(tmp_path / name, engine, with_mtp=False).model for name in ("source", "candidate")]
    for start in range(0, NUM_TOKENS, 32):
        ids_T = torch.tensor(TOKEN_IDS[start : start + 32])
        logits = [model.logits(model(ids_T[None])[0, :-1]).double() for model in both]
        log_p, log_q = (value.log_softmax(-1) for value in logits)
        kl += F.kl_div(log_q, log_p, log_target=True, reduction="sum").item()
        losses.append(F.cross_entropy(logits[0], ids_T[1:], reduction="sum").item())
    assert result.summary is not None
    assert kl / 87 > 1e-3
    assert result.summary.kl_nats.estimate.mean == pytest.approx(kl / 87, rel=1e-4)
    assert result.summary.perplexity.reference == pytest.approx(math.exp(sum(losses) / 87), rel=1e-6)


def test_rows_scored_one_at_a_time_equal_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compared(tmp_path, scale_weights).summary
    monkeypatch.setattr(compare, "_LOGIT_ROWS", 1)
    folders = tmp_path / "source", tmp_path / "candidate"
    single = compare_logits(*folders, text(), OPTIONS, ignore).summary
    assert whole is not None
    assert single is not None
    # a matrix product of one row may round otherwise than one of many
    assert single.kl_nats.estimate.mean == pytest.approx(whole.kl_nats.estimate.mean, rel=1e-4)
    assert single.num_tokens == whole.num_tokens


def test_stride_scores_every_token_but_the_first_once(tmp_path: Path) -> None:
    result = compared(tmp_path, no_edit, replace(OPTIONS, stride=8))
    assert result.num_scored == NUM_TOKENS - 1
    assert {row.num_tokens for row in result.routing} == {NUM_TOKENS - 1}


def test_same_seed_gives_the_same_report(tmp_path: Path) -> None:
    first = compared(tmp_path, scale_weights)
    folders = tmp_path / "source", tmp_path / "candidate"
    assert compare_logits(*folders, text(), OPTIONS, ignore) == first


def test_changed_bias_shows_in_the_routing_of_its_layer(tmp_path: Path) -> None:
    bias = SCHEMA.tensor(Role.ROUTER_BIAS, "gate.e_score_correction_bias", 2)

    def favor_first(tensors: dict[str, torch.Tensor]) -> None:
        tensors[bias.name] = torch.tensor([9.0, 0.0, 0.0, 0.0])

    first, second = compared(tmp_path, favor_first).routing
    assert (first.overlap, first.changed) == (1.0, 0.0)
    assert second.changed > 0.1


def test_non_finite_logits_are_counted_with_the_first_position(tmp_path: Path) -> None:
    """A NaN in the embedding of one token poisons its window: a masked position weighs zero, and 0 * NaN is NaN."""
    embedding = SCHEMA.tensor(Role.EMBEDDING, "embed_tokens.weight")
    poisoned = next(token for token in TOKEN_IDS[32:64] if token not in TOKEN_IDS[:32])

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[embedding.name][poisoned] = torch.nan

    result = compared(tmp_path, poison)
    (found,) = result.non_finite
    assert (found.model, found.first_token, found.first_window) == ("candidate", 33, 1)
    assert result.summary is not None
    assert found.num_tokens == result.num_scored - result.summary.num_tokens > 0
    assert result.summary.kl_nats.estimate.mean == 0.0


@pytest.mark.parametrize(("field", "value"), [("vocab_size", 72), ("first_k_dense_replace", 2)])
def test_models_whose_logits_do_not_correspond_are_refused(tmp_path: Path, field: str, value: int) -> None:
    source = small_checkpoint(tmp_path / "source")
    candidate = small_checkpoint(tmp_path / "candidate", **{field: value})
    with pytest.raises(InputError) as caught:
        compare_logits(source, candidate, text(), OPTIONS, ignore)
    assert caught.value.subject == f"{candidate / 'config.json'}: {field}"


def byte_tokenizer(folder: Path, first_id: int = 0) -> None:
    """Write a tokenizer that gives each byte its own token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: first_id + rank for rank, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))


def test_text_is_encoded_without_prefix_and_cut_into_windows(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "source", vocab_size=256)
    byte_tokenizer(folder)
    encoded = encode_text(folder, "ab" * 10, LogitsOptions(context_length=8))
    assert len(encoded.token_ids) == 20
    assert len(set(encoded.token_ids)) == 2
    assert [window.begin for window in encoded.plan.windows] == [0, 8, 16]


@pytest.mark.parametrize("content", ["", "x"])
def test_text_without_two_tokens_is_refused(tmp_path: Path, content: str) -> None:
    folder = small_checkpoint(tmp_path / "source", vocab_size=256)
    byte_tokenizer(folder)
    with pytest.raises(UsageError, match="at least 2 tokens"):
        encode_text(folder, content, OPTIONS)


def test_window_longer_than_the_models_context_is_refused(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "source", vocab_size=256)
    byte_tokenizer(folder)
    with pytest.raises(UsageError, match=r"--context-length: expected at most 512, the model's own, found 513"):
        encode_text(folder, "some text", LogitsOptions(context_length=513))


def test_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "source", vocab_size=256)
    byte_tokenizer(folder, first_id=200)
    with pytest.raises(InputError, match="expected token ids below vocab_size 256"):
        encode_text(folder, "some text", OPTIONS)
