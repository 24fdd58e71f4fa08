"""Which tokens are scored: each once, whatever the window and stride."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.errors import UsageError
from runtime.verify.windows import WindowPlan, plan_windows


def scored(plan: WindowPlan) -> list[int]:
    return [token for window in plan.windows for token in range(window.first_scored, window.end)]


def test_disjoint_windows_score_all_but_their_first_token() -> None:
    plan = plan_windows(10, context_length=4)
    assert [(window.begin, window.end) for window in plan.windows] == [(0, 4), (4, 8), (8, 10)]
    assert scored(plan) == [1, 2, 3, 5, 6, 7, 9]
    assert plan.num_scored == 7


def test_overlapping_windows_score_only_what_is_new() -> None:
    plan = plan_windows(9, context_length=4, stride=2)
    assert [(window.begin, window.first_scored, window.end) for window in plan.windows] == [
        (0, 1, 4),
        (2, 4, 6),
        (4, 6, 8),
        (6, 8, 9),
    ]


def test_logit_rows_stand_one_before_the_tokens_they_predict() -> None:
    window = plan_windows(9, context_length=4, stride=2).windows[1]
    # window of tokens 2 3 4 5: rows 1 and 2 (tokens 3, 4) predict tokens 4 and 5
    assert window.logit_rows == slice(1, 3)


def test_single_token_left_over_makes_no_window() -> None:
    assert [window.end for window in plan_windows(9, context_length=4).windows] == [4, 8]


def test_num_tokens_limits_the_text() -> None:
    plan = plan_windows(100, context_length=8, num_tokens=10)
    assert (plan.num_text_tokens, plan.num_tokens, plan.windows[-1].end) == (100, 10, 10)
    assert plan_windows(5, context_length=8, num_tokens=10).num_tokens == 5


def test_protocol_says_what_was_scored() -> None:
    assert plan_windows(10, context_length=4).protocol == (
        "first 10 of 10 tokens, no prefix tokens, 3 windows of at most 4, stride 4; 7 tokens scored: "
        "every token but the first of each window"
    )
    assert "every token but the first of the text, once" in plan_windows(10, context_length=4, stride=1).protocol


@pytest.mark.parametrize(
    ("arguments", "subject"),
    [
        ({"num_text_tokens": 1, "context_length": 4}, "--text"),
        ({"num_text_tokens": 0, "context_length": 4}, "--text"),
        ({"num_text_tokens": 9, "context_length": 1}, "--context-length"),
        ({"num_text_tokens": 9, "context_length": 4, "stride": 5}, "--stride"),
        ({"num_text_tokens": 9, "context_length": 4, "stride": 0}, "--stride"),
        ({"num_text_tokens": 9, "context_length": 4, "num_tokens": 1}, "--num-tokens"),
    ],
)
def test_sizes_that_leave_nothing_to_score_are_refused_by_name(arguments: dict[str, int], subject: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan_windows(**arguments)
    assert caught.value.subject == subject


@given(st.integers(2, 200), st.integers(2, 40), st.data())
def test_every_token_is_scored_at_most_once_and_as_promised(
    num_tokens: int, context_length: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context_length))
    plan = plan_windows(num_tokens, context_length=context_length, stride=stride)
    if stride < context_length:
        assert scored(plan) == list(range(1, num_tokens))
    else:
        assert scored(plan) == [token for token in range(num_tokens) if token % context_length]
    for window in plan.windows:
        assert window.end - window.begin <= context_length
        assert window.logit_rows.start >= 0
        assert window.num_scored == window.logit_rows.stop - window.logit_rows.start > 0
