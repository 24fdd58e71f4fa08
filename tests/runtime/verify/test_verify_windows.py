"""Which tokens are scored: each once, whatever the window and stride."""

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.errors import UsageError
from runtime.verify.windows import WindowPlan, plan_texts, plan_windows


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


def test_no_window_spans_two_texts() -> None:
    plan, spans = plan_texts([5, 1, 6], context_length=4)
    assert [(window.begin, window.first_scored, window.end) for window in plan.windows] == [
        (0, 1, 4),
        (6, 7, 10),
        (10, 11, 12),
    ]
    assert [window.index for window in plan.windows] == [0, 1, 2]
    assert spans == (range(12),)
    assert plan.protocol.startswith("12 of 12 tokens of 3 texts, no prefix tokens, 3 windows")


def test_overlapping_windows_stay_in_their_text() -> None:
    plan, _ = plan_texts([5, 4], context_length=4, stride=2)
    assert scored(plan) == [1, 2, 3, 4, 6, 7, 8]
    assert "every token but the first of each text, once" in plan.protocol


def test_one_text_of_several_is_a_text() -> None:
    plan, spans = plan_texts([10], context_length=4, num_tokens=6, seed=3)
    assert plan == plan_windows(10, context_length=4, num_tokens=6)
    assert spans == (range(6),)


def test_texts_take_turns_where_windows_are_drawn() -> None:
    plan, spans = plan_texts([40, 40, 40], context_length=4, num_tokens=14, seed=1)
    # three whole windows, one of each text, and two tokens of the first
    assert sorted(span.start // 40 for span in spans) == [0, 0, 1, 2]
    assert sorted(map(len, spans)) == [2, 4, 4, 4]
    assert plan.windows[0].begin == 0
    assert plan.windows[-1].end == plan.num_tokens == 14
    assert "14 of 120 tokens of 3 texts, windows drawn from each text in turn with seed 1" in plan.protocol


def test_the_seed_decides_which_windows_are_drawn() -> None:
    def spans(seed: int) -> tuple[range, ...]:
        return plan_texts([400, 400], context_length=4, num_tokens=40, seed=seed)[1]

    assert spans(0) == spans(0)
    assert spans(0) != spans(1)


def test_overlapping_windows_are_not_drawn() -> None:
    with pytest.raises(UsageError) as caught:
        plan_texts([40, 40], context_length=4, stride=2, num_tokens=8)
    assert caught.value.subject == "--stride"


@given(
    st.lists(st.integers(0, 40), min_size=2, max_size=5).filter(lambda lengths: max(lengths) > 1),
    st.integers(2, 9),
    st.integers(2, 60),
    st.integers(0, 9),
)
def test_drawn_windows_are_disjoint_stretches_of_single_texts(
    lengths: list[int], context_length: int, num_tokens: int, seed: int
) -> None:
    plan, spans = plan_texts(lengths, context_length=context_length, num_tokens=num_tokens, seed=seed)
    places = [place for span in spans for place in span]
    assert len(places) == len(set(places)) == plan.num_tokens <= max(num_tokens, 0)
    ends = list(accumulate(lengths))
    texts = [sum(place >= end for end in ends) for place in places]
    for window in plan.windows:
        assert len(set(texts[window.begin : window.end])) == 1
        assert 2 <= window.end - window.begin <= context_length
