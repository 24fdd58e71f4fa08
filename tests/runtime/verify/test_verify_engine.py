"""An engine's log-probabilities against ours: from a server, from a file, and everything a server can say instead."""

import json
import math
import socket
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from builders import read_tensors, small_checkpoint, small_config, write_checkpoint
from fake_engine import FakeEngine, serving

from converters.errors import Glm4MoeError, InputError, NetworkError, UsageError
from runtime.streaming.options import StreamOptions
from runtime.verify.engine_answers import PromptScores, prompt_scores
from runtime.verify.engine_client import EngineServer, ServerOptions
from runtime.verify.engine_logprobs import NEAR_TIE_NATS, EngineComparison, compare_engine, kl_lower_bound, match_token
from runtime.verify.store_layout import ModelRun, OnPart, RunOptions
from runtime.verify.streamed import stream_one
from runtime.verify.tokens import EncodedText
from runtime.verify.windows import plan_windows

TOKEN_IDS = tuple(torch.randint(64, (40,), generator=torch.Generator().manual_seed(4)).tolist())
TEXT = EncodedText(TOKEN_IDS, plan_windows(40, context_length=16))
OPTIONS = StreamOptions(floor=False, with_mtp=False)
TOP = ServerOptions(top=5)


def run(
    folder: Path, text: EncodedText, options: RunOptions, on_part: OnPart | None = None, *, behind: int | None = None
) -> ModelRun:
    assert isinstance(options, StreamOptions)
    found = stream_one(folder, text, options, on_part, behind=behind)
    return ModelRun(found.final_hidden_RD, found.routing_ids)


def compare(where: str | Path, folder: Path, server: ServerOptions = TOP, text: EncodedText = TEXT) -> EngineComparison:
    return compare_engine(str(where), folder, text, OPTIONS, run, server=server)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("engine") / "model")


@pytest.fixture
def engine(folder: Path) -> Iterator[FakeEngine]:
    with serving(folder) as engine:
        yield engine


@pytest.mark.parametrize("form", ["prompt_logprobs", "echo"])
def test_an_engine_with_the_same_model_agrees(engine, folder, form):
    """fp32 on both sides, summed in another order: 1e-5 nats are allowed."""
    engine.form = form
    found = compare(engine.url, folder)
    assert (found.num_tokens, found.num_with_top) == (37, 37)
    assert found.nll_difference_max < 1e-5
    assert found.kl_bound is not None
    assert abs(found.kl_bound) < 1e-6
    assert (found.top1, found.near_ties, found.unexplained, found.worst_gap) == (1.0, 0, 0, 0.0)
    assert found.rank_shares == {1: 1.0, 2: 1.0, 5: 1.0, 20: 1.0}
    assert found.perplexity == pytest.approx(found.perplexity_engine, rel=1e-5)
    assert found.notes == ()


def test_the_prompts_are_the_windows_as_ids(engine, folder):
    compare(engine.url, folder)
    assert [request["prompt"] for request in engine.requests] == [
        list(TOKEN_IDS[begin : begin + 16]) for begin in (0, 16, 32)
    ]
    assert {request["model"] for request in engine.requests} == {"served"}
    assert {request["path"] for request in engine.requests} == {"/v1/completions"}


def test_a_server_that_only_knows_echo_is_asked_the_other_way_once(engine, folder):
    engine.form = "echo"
    compare(engine.url, folder)
    assert [("echo" in request) for request in engine.requests] == [False, True, True, True]


def test_token_names_as_text_leave_the_losses(engine, folder):
    engine.form = "text"
    found = compare(engine.url, folder)
    assert found.nll_difference_max < 1e-5
    assert (found.num_with_top, found.kl_bound, found.top1) == (0, None, None)
    assert found.notes == ("engine: 37 of 37 tokens came without the most likely ones; only their loss was compared",)


def test_another_model_does_not_agree(engine, folder, tmp_path):
    tensors = {name: value * 1.5 if value.ndim == 2 else value for name, value in read_tensors(folder).items()}
    other = write_checkpoint(tmp_path / "other", tensors, small_config())
    found = compare(engine.url, other)
    assert found.kl_bound is not None
    assert found.kl_bound > 1e-3
    assert found.nll_difference_rms > 0.1
    assert found.unexplained > 0
    assert found.worst_gap > NEAR_TIE_NATS


def test_saved_answers_say_the_same_as_the_server(engine, folder, tmp_path):
    prompts = [TOKEN_IDS[begin : begin + 16] for begin in (0, 16, 32)]
    answers = list(EngineServer(engine.url, TOP).answers(prompts))
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, answers)) + "\n\n")
    of_server, of_file = compare(engine.url, folder), compare(path, folder)
    assert of_server.nll_difference == of_file.nll_difference
    assert of_server.kl_bound == of_file.kl_bound
    # one answer to several prompts
    together = {"choices": [{**answer["choices"][0], "index": index} for index, answer in enumerate(answers)]}
    path.write_text(json.dumps({"choices": together["choices"][::-1]}))
    assert compare(path, folder).nll_difference == of_file.nll_difference


@pytest.mark.parametrize(
    ("count", "found"), [(0, "found 0"), (2, "found 2"), (4, "found more")], ids=["none", "few", "many"]
)
def test_a_file_with_another_number_of_answers_is_refused(engine, folder, tmp_path, count, found):
    prompts = [TOKEN_IDS[begin : begin + 16] for begin in (0, 16, 32, 32)]
    answers = list(EngineServer(engine.url, TOP).answers(prompts))[:count]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(f"{json.dumps(answer)}\n" for answer in answers))
    with pytest.raises(InputError, match=f"answers to 3 prompts, one for each window, {found}"):
        compare(path, folder)


def test_answers_in_another_order_are_refused(engine, folder, tmp_path):
    prompts = [TOKEN_IDS[begin : begin + 16] for begin in (16, 0, 32)]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(f"{json.dumps(answer)}\n" for answer in EngineServer(engine.url, TOP).answers(prompts)))
    with pytest.raises(InputError, match="answer 1: expected the 16 tokens of this window"):
        compare(path, folder)


@pytest.mark.parametrize("line", [b"{", b"[1]", b'{"error": {"message": "too long"}}', b'{"choices": []}', b"{}"])
def test_lines_that_are_no_answers_are_refused(folder, tmp_path, line):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(line)
    with pytest.raises(InputError, match="engine-logprobs"):
        compare(path, folder)


def test_a_place_that_is_neither_file_nor_server_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="neither"):
        compare(tmp_path / "none.jsonl", folder)
    for url in ("ftp://localhost/v1", "file:///etc/passwd", "http:///v1"):
        with pytest.raises(UsageError, match="http://HOST:PORT/v1"):
            compare(url, folder)


def test_nobody_listening_is_one_message(folder):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(NetworkError, match=r"a server that answers, found .*refused.*finished loading"):
            compare(url, folder)


def test_a_silent_server_is_given_up(engine, folder):
    engine.hang = threading.Event()
    with pytest.raises(NetworkError, match=r"no answer within 0\.2 s|timed out"):
        compare(engine.url, folder, ServerOptions(model="served", top=5, timeout_s=0.2))


def test_a_server_without_prompt_logprobs_is_refused(engine, folder):
    engine.form = "none"
    with pytest.raises(InputError, match=r"log-probabilities of the prompt.*found none.*such as vLLM"):
        compare(engine.url, folder)


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (400, InputError, "HTTP status 400: .*fewer log-probabilities"),
        (404, InputError, "HTTP status 404"),
        (401, NetworkError, "wants a key"),
        (500, NetworkError, "server's own log"),
        (307, InputError, "HTTP status 307"),
    ],
)
def test_a_refusal_of_the_server_is_passed_on(engine, folder, status, error, words):
    engine.status, engine.raw = status, b'{"error": {"message": "no\x1b[31m"}}'
    engine.headers = {"Location": "http://127.0.0.1:1/v1/completions"} if status == 307 else {}
    with pytest.raises(error, match=words) as caught:
        compare(engine.url, folder, ServerOptions(model="served"))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("raw", [b"<html>", b"[1]", b"\xff\xfe"])
def test_what_is_no_json_object_is_refused(engine, folder, raw):
    engine.raw = raw
    with pytest.raises(InputError, match="not the API of an OpenAI-compatible server"):
        compare(engine.url, folder, ServerOptions(model="served"))


def test_one_of_several_models_must_be_named(engine, folder):
    engine.models = ["one", "served"]
    with pytest.raises(UsageError, match="a server with one model, found one, served"):
        compare(engine.url, folder)
    compare(engine.url, folder, ServerOptions(model="served", top=5))


def test_a_key_is_sent_and_not_shown(engine, folder):
    compare(engine.url, folder, ServerOptions(top=5, api_key="secret"))
    assert engine.requests[0]["authorization"] == "Bearer secret"
    engine.status, engine.raw = 401, b"{}"
    with pytest.raises(NetworkError) as caught:
        compare(engine.url, folder, ServerOptions(model="served", api_key="secret"))
    assert "secret" not in str(caught.value)


def break_vocabulary(found: dict) -> None:
    found["choices"][0]["prompt_logprobs"][3]["64"] = {"logprob": -1.0}


def break_length(found: dict) -> None:
    found["choices"][0]["prompt_logprobs"].pop()


def break_tokens(found: dict) -> None:
    found["choices"][0]["prompt_token_ids"][2] ^= 1


def break_own_token(found: dict) -> None:
    del found["choices"][0]["prompt_token_ids"]
    found["choices"][0]["prompt_logprobs"][1] = {"63": {"logprob": -1.0}}


def break_number(found: dict) -> None:
    found["choices"][0]["prompt_logprobs"][1][str(TOKEN_IDS[1])]["logprob"] = math.nan


def break_sign(found: dict) -> None:
    found["choices"][0]["prompt_logprobs"][1][str(TOKEN_IDS[1])]["logprob"] = 3.0


def break_name(found: dict) -> None:
    found["choices"][0]["prompt_logprobs"][1]["x"] = {"logprob": -1.0}


def break_entry(found: dict) -> None:
    found["choices"][0]["prompt_logprobs"][1] = [1]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (break_vocabulary, "token ids below vocab_size 64, found 64. The server runs a model with another vocabulary"),
        (break_length, "log-probabilities of 16 tokens, found 15"),
        (break_tokens, "the 16 tokens of this window"),
        (break_own_token, "the log-probability of token"),
        (break_number, "prompt_logprobs"),
        (break_sign, "prompt_logprobs"),
        (break_name, "prompt_logprobs"),
        (break_entry, "prompt_logprobs"),
    ],
)
def test_answers_about_something_else_are_refused(engine, folder, edit, words):
    engine.edit = edit
    with pytest.raises(InputError, match=words):
        compare(engine.url, folder)


def echo(**changes: object) -> dict:
    logprobs = {"tokens": ["token_id:1", "token_id:2"], "token_logprobs": [None, -1.0], "top_logprobs": None}
    return {"logprobs": {**logprobs, **changes}}


def test_echo_without_the_most_likely_tokens_has_losses_alone():
    assert prompt_scores(echo(), [1, 2], 64, "it") == PromptScores((None, -1.0), (None, None))


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": None},
        {"tokens": ["token_id:1"], "token_logprobs": [None]},
        {"tokens": ["token_id:1", "token_id:3"]},
        {"tokens": ["token_id:1", "token_id:-2"]},
        {"token_logprobs": [None, None]},
        {"token_logprobs": [None, "x"]},
        {"top_logprobs": [None]},
        {"top_logprobs": [None, [1]]},
        {"top_logprobs": [None, {"token_id:5": math.nan}]},
        {"top_logprobs": [None, {"token_id:64": -1.0}]},
    ],
)
def test_a_damaged_echo_is_refused(changes):
    with pytest.raises(Glm4MoeError, match="it"):
        prompt_scores(echo(**changes), [1, 2], 64, "it")


def test_kl_bound_of_a_hand_computed_case():
    """p = 1/2, 1/4, 1/4 and q = 1/4, 1/4, 1/2; told of the first alone: 1/2 ln 2 + 1/2 ln (1/2 / 3/4)."""
    log_p, log_q = (torch.tensor(values, dtype=torch.float64).log() for values in ((0.5, 0.25), (0.25, 0.25)))
    assert kl_lower_bound(log_p[:1], log_q[:1]) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    whole = 0.5 * math.log(2) + 0.25 * math.log(0.25 / 0.5)
    assert kl_lower_bound(log_p, log_q) == pytest.approx(whole)


def test_kl_bound_never_exceeds_the_kl():
    generator = torch.Generator().manual_seed(2)
    for _ in range(50):
        log_p, log_q = (torch.randn(30, generator=generator).double().log_softmax(0) for _ in range(2))
        kl = (log_p.exp() * (log_p - log_q)).sum().item()
        bounds = [kl_lower_bound(log_p[:count], log_q[:count]) for count in (1, 5, 29, 30)]
        assert all(fewer <= more + 1e-9 for fewer, more in pairwise(bounds))
        assert bounds[-1] == pytest.approx(kl, abs=1e-5)


def test_probabilities_that_cannot_be_give_no_bound():
    assert kl_lower_bound(torch.tensor([-1.0, -1.0]).double(), torch.tensor([-0.1, -0.1]).double()) is None


@pytest.mark.parametrize(
    ("top", "gap", "rank"),
    [
        ({0: -0.5, 1: -1.0}, 0.0, 1),
        ({0: -1.0, 1: -0.5}, math.log(2), 2),
        # a tie of the engine, such as bf16 makes, is resolved in favour
        ({0: -0.7, 1: -0.7}, 0.0, 1),
        ({3: -0.1, 2: -5.0}, math.log(8), 4),
    ],
)
def test_a_flip_is_measured_by_our_own_distribution(top, gap, rank):
    log_p = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625], dtype=torch.float64).log()
    token = next(iter(top))
    found = match_token(log_p, token, PromptScores((None, top[token]), (None, top)), 1)
    assert (found.gap, found.rank) == (pytest.approx(gap), rank)
    assert (found.nll, found.nll_engine) == (pytest.approx(-log_p[token].item()), -top[token])
