"""What an evaluation harness is told, against the model's own logits; no harness is needed here."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from converters.errors import UsageError
from runtime.engine.request import SamplingParams
from runtime.harness.answers import Answerer, GenerateOptions, rolling_pairs
from runtime.streaming.options import StreamOptions
from runtime.verify.streamed import compare_streamed
from runtime.verify.tokens import EncodedText
from runtime.verify.windows import plan_windows
from tests.architecture.sources import ROOT

LENGTH = 64


@pytest.fixture(scope="module")
def answerer(tiny: Path) -> Answerer:
    return Answerer.open(tiny, dtype="float32", device="cpu", max_length=LENGTH)


@pytest.fixture(scope="module")
def ids(answerer: Answerer, held_out: Path) -> list[int]:
    return answerer.tokenizer.encode(held_out.read_text(encoding="utf-8")[:4000])


def expected(answerer: Answerer, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    fed = torch.tensor([[*context, *continuation]])
    model = answerer.engine.model
    rows = model.logits(model(fed)[0])[len(context) - 1 : -1]
    logprobs = rows.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])
    return logprobs.double().sum().item(), rows.argmax(-1).tolist() == continuation


def test_a_continuation_is_as_likely_as_the_logits_say(answerer, ids):
    """Fed in chunks and at once: 1e-4 nats over 20 tokens are allowed."""
    found = answerer.likelihood(ids[:30], ids[30:50])
    logprob, is_greedy = expected(answerer, ids[:30], ids[30:50])
    assert found.logprob == pytest.approx(logprob, abs=1e-4)
    assert found.is_greedy is is_greedy is False


def test_the_models_own_continuation_is_greedy(answerer, ids):
    own = [token.token_id for token in answerer.engine.generate(ids[:20], SamplingParams(max_tokens=6))]
    assert answerer.likelihood(ids[:20], own).is_greedy


def test_a_long_context_loses_its_begin(answerer, ids):
    cut = answerer.likelihood(ids[: 2 * LENGTH], ids[2 * LENGTH : 2 * LENGTH + 4])
    start = 2 * LENGTH + 4 - LENGTH - 1
    assert cut.logprob == pytest.approx(
        expected(answerer, ids[start : 2 * LENGTH], ids[2 * LENGTH : 2 * LENGTH + 4])[0], abs=1e-4
    )


def test_choices_of_one_context_are_fed_once(answerer, ids, monkeypatch):
    fed: list[int] = []
    real = type(answerer.engine.model).forward

    def counted(self, token_ids, **others):
        fed.append(token_ids.shape[1])
        return real(self, token_ids, **others)

    monkeypatch.setattr(type(answerer.engine.model), "forward", counted)
    totals = [answerer.likelihood(ids[:25], [token]).logprob for token in (1, 2, 3)]
    assert fed == [25]
    assert len(set(totals)) == 3


@pytest.mark.parametrize(("context", "count"), [(0, 3), (3, 0), (3, LENGTH + 1)])
def test_what_cannot_be_scored_is_refused(answerer, ids, context, count):
    with pytest.raises(UsageError, match="loglikelihood"):
        answerer.likelihood(ids[:context], ids[10 : 10 + count])


def test_an_answer_ends_before_a_stop_text(answerer, ids):
    params = SamplingParams(max_tokens=20)
    whole = answerer.generate(ids[:40], GenerateOptions(params=params))
    stop = whole[5:7]
    assert len(whole) > 10
    assert (
        answerer.generate(ids[:40], GenerateOptions(until=("never met", stop), params=params))
        == whole.partition(stop)[0]
    )
    assert answerer.generate(ids[:40], GenerateOptions(until=("", "never met"), params=params)) == whole


def test_a_long_prompt_leaves_room_for_the_answer(answerer, ids):
    params = SamplingParams(max_tokens=8)
    asked = GenerateOptions(params=params)
    assert answerer.generate(ids, asked) == answerer.generate(ids[-LENGTH + 8 :], asked)
    with pytest.raises(UsageError, match="fewer than 64 tokens of output"):
        answerer.generate(ids, GenerateOptions(params=SamplingParams(max_tokens=LENGTH)))


@pytest.mark.parametrize("length", [1, 2049])
def test_a_length_that_the_model_cannot_hold_is_refused(tiny, length):
    with pytest.raises(UsageError, match="max_length: expected 2 to 2048"):
        Answerer.open(tiny, max_length=length)


def test_rolling_windows_predict_every_token_once():
    """As in the harness's own documentation; its last window has the full context, ours is the same."""
    tokens = list(range(10))
    assert list(rolling_pairs(tokens, 99, 4)) == [
        ([99], [0, 1, 2, 3]),
        ([3], [4, 5, 6, 7]),
        ([5, 6, 7], [8, 9]),
    ]
    assert list(rolling_pairs([1, 2], 99, 4)) == [([99], [1, 2])]
    assert list(rolling_pairs([], 99, 4)) == []


def test_rolling_perplexity_is_that_of_verify_at_the_same_window(tiny, answerer, ids):
    """A text of whole windows; summed in another order, 1e-6 relative is allowed."""
    text = ids[: 4 * LENGTH]
    pairs = rolling_pairs(text, answerer.end_token_id, LENGTH)
    nll = -sum(answerer.likelihood(*pair).logprob for pair in pairs) / len(text)
    with_prefix = (answerer.end_token_id, *text)
    plan = plan_windows(len(with_prefix), context_length=LENGTH + 1, stride=LENGTH)
    assert plan.num_scored == len(text)
    options = StreamOptions(levels=frozenset({"logits"}), floor=False, with_mtp=False)
    summary = compare_streamed(tiny, tiny, EncodedText(with_prefix, plan), options).summary
    assert summary is not None
    assert math.exp(nll) == pytest.approx(summary.perplexity.reference, rel=1e-6)


def test_without_the_harness_one_line_says_what_to_install():
    program = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "import runpy; runpy.run_module('runtime.harness', run_name='__main__', alter_sys=True)"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("Error: lm_eval: ")
    assert ended.stderr.endswith("pip install 'glm4moe[lm-eval]'.\n")
