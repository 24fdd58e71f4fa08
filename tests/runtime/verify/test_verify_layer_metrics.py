"""Errors of one layer against cases computed by hand."""

import math

import pytest
import torch

from runtime.moe.router import Routing
from runtime.verify import layer_metrics
from runtime.verify.layer_metrics import (
    DEFAULT_MARGIN_LIMIT,
    ExpertSum,
    OutputErrorSum,
    RouterSum,
    ScoreChange,
    margins,
    total_variation,
)
from runtime.verify.results import ExpertDifference, OutputError

# |u|^2 = 25 + 25, |u_hat|^2 = 34 + 26, <u, u_hat> = 29 + 25, |u_hat - u|^2 = 1 + 1
U = torch.tensor([[3.0, 4.0], [5.0, 0.0]])
U_HAT = torch.tensor([[3.0, 5.0], [5.0, 1.0]])


def errors(u: torch.Tensor, u_hat: torch.Tensor, first_token: int = 0, floor: float | None = None) -> OutputError:
    sums = OutputErrorSum()
    sums.add(u, u_hat, torch.arange(first_token, first_token + len(u)))
    return sums.result(floor)


def test_output_error_of_two_tokens_by_hand() -> None:
    found = errors(U, U_HAT, first_token=7, floor=0.001)
    relative = math.sqrt(2 / 50)
    assert found.relative == pytest.approx(relative, rel=1e-15)
    assert found.sqnr_db == pytest.approx(-20 * math.log10(relative))
    assert found.cosine == pytest.approx((9 + 20 + 25) / math.sqrt(50 * (34 + 26)))
    assert found.slope == pytest.approx(54 / 50)
    # 1/5 in both: the first of the equals
    assert (found.worst_token_relative, found.worst_token) == (pytest.approx(0.2), 7)
    assert found.floor_relative == 0.001


def test_equal_outputs_have_no_error_and_infinite_sqnr() -> None:
    assert errors(U, U.clone()) == OutputError(0.0, 0.0, 0, pytest.approx(1.0), math.inf, 1.0, None)


def test_a_gain_shows_as_slope_and_not_in_the_cosine() -> None:
    found = errors(U, U * 1.02)
    assert found.slope == pytest.approx(1.02, rel=1e-6)
    assert found.relative == pytest.approx(0.02, rel=1e-5)
    assert found.cosine == pytest.approx(1.0, abs=1e-12)


def test_worst_token_is_found_by_its_own_error_not_by_its_size() -> None:
    u = torch.tensor([[100.0, 0.0], [1.0, 0.0], [10.0, 0.0]])
    found = errors(u, u + torch.tensor([[5.0, 0.0], [0.5, 0.0], [1.0, 0.0]]), first_token=40)
    assert (found.worst_token, found.worst_token_relative) == (41, pytest.approx(0.5))


@pytest.mark.parametrize(
    ("u", "u_hat", "expected"),
    [
        ([0.0, 0.0], [0.0, 0.0], OutputError(0.0, 0.0, 0, 1.0, math.inf, 1.0)),
        ([0.0, 0.0], [0.0, 2.0], OutputError(math.inf, math.inf, 0, 0.0, -math.inf, 1.0)),
        ([0.0, 2.0], [0.0, 0.0], OutputError(1.0, 1.0, 0, 0.0, 0.0, 0.0)),
    ],
)
def test_zeros_on_a_side(u: list[float], u_hat: list[float], expected: OutputError) -> None:
    found = errors(torch.tensor([u]), torch.tensor([u_hat]))
    # -20 log10(1) is -0.0, which equals 0.0
    assert found == expected


def test_blocks_and_calls_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    u, noise = torch.randn(2, 9, 16, generator=generator)
    whole = errors(u, u + 0.01 * noise)
    monkeypatch.setattr(layer_metrics, "_BLOCK_ELEMENTS", 32)
    sums = OutputErrorSum()
    for begin, end in ((0, 4), (4, 9)):
        sums.add(u[begin:end], (u + 0.01 * noise)[begin:end], torch.arange(begin, end))
    parts = sums.result()
    for name in ("relative", "worst_token_relative", "worst_token", "cosine", "sqnr_db", "slope"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-12), name


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_token_that_is_not_finite_is_counted_and_left_out(bad: float, side: int) -> None:
    sides = [torch.cat([U, torch.ones(1, 2)]), torch.cat([U_HAT, torch.ones(1, 2)])]
    sides[side][2, 0] = bad
    sums = OutputErrorSum()
    sums.add(*sides, torch.arange(3))
    assert (sums.num_tokens, sums.num_skipped) == (3, 1)
    assert sums.result() == errors(U, U_HAT)


def test_nothing_finite_is_nan_at_the_first_token_left_out() -> None:
    nan = torch.full((2, 2), math.nan)
    found = errors(nan, nan, first_token=5)
    assert found.worst_token == 5
    values = found.relative, found.worst_token_relative, found.cosine, found.sqnr_db, found.slope
    assert all(math.isnan(value) for value in values)


def test_large_values_do_not_overflow_and_bf16_is_taken_as_it_is() -> None:
    huge = torch.full((1, 4), 3e38)
    assert errors(huge, huge * 1.0).relative == 0.0
    assert errors(U.bfloat16(), U_HAT.bfloat16()) == errors(U, U_HAT)


LOGIT_HALF, LOGIT_QUARTER = 0.0, math.log(1 / 3)
BIAS = torch.tensor([0.1, 0.0, 0.3, 0.0])


def routing(logits: list[list[float]], ids: list[list[int]], weights: list[list[float]]) -> Routing:
    return Routing(3, torch.tensor(logits), torch.tensor(ids), torch.tensor(weights))


def two_tokens() -> tuple[Routing, Routing]:
    """Biased scores of both tokens: 0.6, 0.5, 0.55, 0.25, so the margin of experts 0 and 2 is 0.05."""
    row = [LOGIT_HALF, LOGIT_HALF, LOGIT_QUARTER, LOGIT_QUARTER]
    reference = routing([row, row], [[0, 2], [0, 2]], [[1.5, 0.5], [1.5, 0.5]])
    other = [LOGIT_HALF, LOGIT_HALF + 0.7, LOGIT_QUARTER, LOGIT_QUARTER]
    candidate = routing([row, other], [[2, 0], [1, 0]], [[0.5, 1.5], [1.0, 1.0]])
    return reference, candidate


def test_margin_is_the_least_chosen_score_less_the_best_other() -> None:
    reference, _ = two_tokens()
    found = margins(reference.router_logits_TE, BIAS, reference.topk_ids_TK)
    assert found.tolist() == pytest.approx([0.05, 0.05], abs=1e-7)


def test_margin_of_a_router_that_takes_every_expert_is_infinite() -> None:
    assert margins(torch.zeros(1, 2), torch.zeros(2), torch.tensor([[0, 1]])).item() == math.inf


def test_router_difference_by_hand() -> None:
    """Token 11 keeps its set in another order; token 12 has expert 1 for expert 2, which moves 0.5 of a sum of 2."""
    sums = RouterSum()
    sums.add(*two_tokens(), BIAS, torch.tensor([11, 12]))
    found = sums.result(margin_limit=0.04)
    assert (found.changed, found.overlap) == (0.5, 0.75)
    assert (found.unexplained, found.margin_limit) == (1, 0.04)
    assert (found.worst_margin, found.worst_token) == (pytest.approx(0.05, abs=1e-7), 12)
    # |1.0 - 0| + |0 - 0.5| + |1.0 - 1.5| = 2, half of it by 2, over two tokens
    assert found.weight_moved == pytest.approx(0.25)
    # loads (2, 0, 2, 0) against (2, 1, 1, 0) of 4
    assert found.load_shift == pytest.approx(0.25)
    assert found.logit_max_abs == pytest.approx(0.7)
    assert sums.result(margin_limit=0.06).unexplained == 0


def test_router_sums_over_calls_and_default_limit() -> None:
    reference, candidate = two_tokens()
    sums = RouterSum()
    sums.add(reference, reference, BIAS, torch.tensor([0, 1]))
    sums.add(reference, candidate, BIAS, torch.tensor([2, 3]))
    found = sums.result()
    assert (found.changed, found.overlap, found.worst_token) == (0.25, 0.875, 3)
    assert (found.margin_limit, found.unexplained) == (DEFAULT_MARGIN_LIMIT, 1)


def test_equal_routers_differ_in_nothing() -> None:
    reference, _ = two_tokens()
    sums = RouterSum()
    sums.add(reference, reference, BIAS, torch.tensor([0, 1]))
    found = sums.result()
    assert (found.changed, found.overlap, found.unexplained, found.worst_margin) == (0.0, 1.0, 0, 0.0)
    assert (found.worst_token, found.weight_moved, found.load_shift, found.logit_max_abs) == (None, 0.0, 0.0, 0.0)


def test_router_of_a_token_with_nan_is_left_out() -> None:
    reference, candidate = two_tokens()
    candidate.router_logits_TE[1, 3] = math.nan
    sums = RouterSum()
    sums.add(reference, candidate, BIAS, torch.tensor([0, 1]))
    assert (sums.num_tokens, sums.num_skipped) == (2, 1)
    assert sums.result().changed == 0.0


def test_router_without_a_finite_token_has_no_shares() -> None:
    reference, candidate = two_tokens()
    candidate.router_logits_TE[:] = math.nan
    sums = RouterSum()
    sums.add(reference, candidate, BIAS, torch.tensor([0, 1]))
    found = sums.result()
    assert math.isnan(found.changed)
    assert math.isnan(found.load_shift)
    assert found.unexplained == 0


def test_margin_limit_is_four_times_the_99th_percentile_of_score_changes() -> None:
    """Of 100 changes 0, 1e-3 once and 2e-3 once the nearest-rank percentile is the second largest."""
    noisy = torch.zeros(10, 10)
    noisy[0, 0], noisy[0, 1] = math.log(0.501 / 0.499), math.log(0.502 / 0.498)
    change = ScoreChange()
    change.add(torch.zeros(4, 10), noisy[:4])
    change.add(torch.zeros(6, 10), noisy[4:])
    assert change.margin_limit() == pytest.approx(4e-3, rel=1e-4)
    assert ScoreChange().margin_limit() == DEFAULT_MARGIN_LIMIT


def test_total_variation_of_disjoint_loads_is_one() -> None:
    assert total_variation(torch.tensor([[3, 0], [0, 5]])) == 1.0


def test_experts_by_hand() -> None:
    sums = ExpertSum(3)
    sums.add(0, U, U_HAT, torch.tensor([0, 4]))
    sums.add(2, U[:1], U[:1] * 2, torch.tensor([1]))
    sums.add_candidate(torch.tensor([[0, 1], [0, 2]]))
    sums.add_candidate(torch.tensor([[0, 1]]))
    assert sums.result() == (
        ExpertDifference(0, 2, 3, pytest.approx(0.2), pytest.approx(1.08)),
        ExpertDifference(1, 0, 2, None, None),
        ExpertDifference(2, 1, 1, pytest.approx(1.0), pytest.approx(2.0)),
    )
