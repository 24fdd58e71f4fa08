"""Per-token metrics against cases computed by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.verify import metrics
from runtime.verify.metrics import TokenScores, kl_divergence, score_tokens, set_overlap

# p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): KL = 1/2 ln 2 + 0 - 1/4 ln 2 = 1/4 ln 2
P = [0.5, 0.25, 0.25]
Q = [0.25, 0.25, 0.5]


def logits(*rows: list[float], shift: float = 0.0) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log().float() + shift


def random_logits(seed: int, num_tokens: int = 6, vocab_size: int = 40, scale: float = 4.0) -> torch.Tensor:
    return torch.randn(num_tokens, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def random_ids(seed: int, num_tokens: int = 6, vocab_size: int = 40) -> torch.Tensor:
    return torch.randint(vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(seed))


def test_kl_of_two_hand_computed_distributions_is_quarter_ln_two() -> None:
    scores = score_tokens(logits(P), logits(Q, shift=3.0), torch.tensor([2]))
    assert scores.kl_nats.item() == pytest.approx(0.25 * math.log(2), abs=1e-7)
    assert scores.kl_nats.dtype == torch.float64


def test_kl_sums_over_the_vocabulary_where_kl_div_mean_divides_by_it() -> None:
    """F.kl_div(reduction="mean") is V times too small; with two tokens and V = 3 it is the token mean divided by 3."""
    log_p, log_q = logits(P, Q).double(), logits(Q, P).double()
    ours = kl_divergence(log_p, log_q).mean()
    with pytest.warns(UserWarning, match="divides the total loss by both"):
        trap = F.kl_div(log_q, log_p, log_target=True, reduction="mean")
    assert ours.item() == pytest.approx(0.25 * math.log(2), abs=1e-7)
    assert (ours / trap).item() == pytest.approx(3.0)


def test_kl_direction_is_reference_to_candidate() -> None:
    sharp, flat = [0.9, 0.1], [0.5, 0.5]
    forward = score_tokens(logits(sharp), logits(flat), torch.tensor([0])).kl_nats.item()
    backward = score_tokens(logits(flat), logits(sharp), torch.tensor([0])).kl_nats.item()
    assert forward == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), abs=1e-7)
    assert backward == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5.0), abs=1e-7)


def test_nll_and_probability_change_are_of_the_token_that_follows() -> None:
    scores = score_tokens(logits(P, P), logits(Q, Q), torch.tensor([0, 2]))
    assert scores.nll_reference.tolist() == pytest.approx([math.log(2), math.log(4)], abs=1e-6)
    assert scores.nll_candidate.tolist() == pytest.approx([math.log(4), math.log(2)], abs=1e-6)
    assert scores.delta_p.tolist() == pytest.approx([-0.25, 0.25], abs=1e-7)


def test_logit_difference_is_taken_before_any_softmax() -> None:
    scores = score_tokens(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, 1.5, 0.0]]), torch.tensor([0]))
    assert scores.logit_max_abs.item() == 2.0
    assert scores.logit_mean_square.item() == pytest.approx((0.25 + 4.0) / 3)


def test_top_agreement_counts_order_free_sets_of_five() -> None:
    reference = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3], [9.0, 8, 7, 6, 5, 4, 3]])
    # row 0: same five in another order; row 1: the reference's best is sixth, 4 of 5 shared
    candidate = torch.tensor([[8.0, 9, 5, 6, 7, 4, 3], [2.0, 8, 7, 6, 5, 4, 1]])
    scores = score_tokens(reference, candidate, torch.tensor([0, 0]))
    assert scores.top1_same.tolist() == [0.0, 0.0]
    assert scores.top5_overlap.tolist() == [1.0, pytest.approx(0.8)]
    assert scores.top1_in_top5.tolist() == [1.0, 0.0]


def test_top_five_of_a_smaller_vocabulary_is_the_whole_of_it() -> None:
    assert score_tokens(logits(P), logits(Q), torch.tensor([0])).top5_overlap.item() == 1.0


def test_top_ten_counts_ten() -> None:
    reference = torch.arange(12.0, 0.0, -1.0)[None]
    candidate = reference.clone()
    # ranks 1 and 12 exchanged: 4 of 5, and 9 of 10, are still there
    candidate[0, [0, 11]] = candidate[0, [11, 0]]
    scores = score_tokens(reference, candidate, torch.tensor([0]))
    assert (scores.top5_overlap.item(), scores.top10_overlap.item()) == (pytest.approx(0.8), pytest.approx(0.9))
    assert score_tokens(logits(P), logits(Q), torch.tensor([0])).top10_overlap.item() == 1.0


def test_confidence_is_the_references_own() -> None:
    scores = score_tokens(logits(P, P), logits(Q, [0.9, 0.05, 0.05]), torch.tensor([0, 0]))
    assert scores.max_p_reference.tolist() == pytest.approx([0.5, 0.5], abs=1e-7)
    assert scores.gap_reference.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-6)
    assert score_tokens(torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([0])).gap_reference.item() == math.inf


def test_set_overlap_ignores_order() -> None:
    ids, other = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]]), torch.tensor([[4, 3, 2, 1], [5, 1, 6, 2]])
    assert set_overlap(ids, other).tolist() == [1.0, 0.5]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_row_is_marked_and_never_counts_as_agreement(bad: float) -> None:
    candidate = logits(P, P, P)
    candidate[1, 2] = bad
    scores = score_tokens(logits(P, P, P), candidate, torch.tensor([0, 0, 0]))
    assert scores.finite_reference.tolist() == [True, True, True]
    assert scores.finite_candidate.tolist() == [True, False, True]
    assert scores.kl_nats.isnan().tolist() == [False, True, False]
    assert scores.top1_same.isnan().tolist() == [False, True, False]


def test_bf16_logits_are_widened_before_the_softmax() -> None:
    reference, candidate = random_logits(0).bfloat16(), random_logits(1).bfloat16()
    narrow = score_tokens(reference, candidate, random_ids(0))
    wide = score_tokens(reference.float(), candidate.float(), random_ids(0))
    assert torch.equal(narrow.kl_nats, wide.kl_nats)


def test_chunks_of_one_row_equal_one_shot(monkeypatch: pytest.MonkeyPatch) -> None:
    args = random_logits(2, 9), random_logits(3, 9), random_ids(2, 9)
    whole = score_tokens(*args)
    monkeypatch.setattr(metrics, "_CHUNK_ELEMENTS", 1)
    chunked = score_tokens(*args)
    for name in TokenScores.__slots__:
        assert torch.equal(getattr(whole, name), getattr(chunked, name)), name


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.0, 30.0))
def test_kl_is_never_below_rounding(seed: int, scale: float) -> None:
    reference = random_logits(seed, scale=scale)
    scores = score_tokens(reference, reference + random_logits(seed + 1, scale=0.01), random_ids(seed))
    assert scores.kl_nats.min().item() > -1e-6


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_kl_of_a_model_with_itself_is_exactly_zero(seed: int) -> None:
    same = random_logits(seed)
    scores = score_tokens(same, same.clone(), random_ids(seed))
    assert scores.kl_nats.tolist() == [0.0] * 6
    assert scores.top1_same.tolist() == scores.top5_overlap.tolist() == [1.0] * 6


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_scores_do_not_depend_on_the_order_of_the_vocabulary(seed: int) -> None:
    reference, candidate, ids = random_logits(seed), random_logits(seed + 1), random_ids(seed)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    moved = score_tokens(reference[:, order], candidate[:, order], order.argsort()[ids])
    plain = score_tokens(reference, candidate, ids)
    for name in TokenScores.__slots__:
        torch.testing.assert_close(getattr(moved, name), getattr(plain, name), rtol=1e-5, atol=1e-6)


def test_metrics_keep_nothing_of_vocabulary_size() -> None:
    scores = score_tokens(random_logits(5), random_logits(6), random_ids(5))
    assert all(getattr(scores, name).shape == (6,) for name in TokenScores.__slots__)
