"""Two models answer: what differs, and what of it is a near tie."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import read_tensors
from safetensors.torch import save_file

from converters.errors import InputError, ResourceError, UsageError
from converters.findings import Severity
from runtime.engine.tokenizer import Tokenizer
from runtime.verify import text_level
from runtime.verify.text_answers import Answer, is_loop, tool_calls
from runtime.verify.text_level import check_memory, check_text
from runtime.verify.text_prompts import PROMPTS, encode_prompt
from runtime.verify.text_results import TextOptions, TextResult, find_difference, judge_answers

SHORT = TextOptions(max_tokens=12)
TWO = PROMPTS[1:3]


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny, tmp_path / "copy")


def test_a_model_answers_as_itself(tiny):
    report = check_text(tiny, tiny, SHORT)
    assert report.problems == ()
    assert [result.prompt for result in report.results] == ["thinking", "no thinking", "code", "tool call"]
    assert all(result.first_difference is None for result in report.results)
    assert all(len(result.reference.token_ids) <= 12 for result in report.results)
    assert "4 chat prompts, greedy, at most 12 tokens each, float32" in report.protocol


def test_the_prompts_are_what_the_template_makes(tiny):
    tokenizer = Tokenizer.open(tiny)
    whole = [tokenizer.decode(encode_prompt(tokenizer, prompt), skip_special=False) for prompt in PROMPTS]
    assert [prompt.endswith("<|assistant|>") for prompt in whole] == [True, False, False, False]
    assert all(prompt.endswith("<think></think>") for prompt in whole[1:])
    assert ['"get_weather"' in prompt for prompt in whole] == [False, False, False, True]


def test_a_damaged_model_is_caught(tiny, copy):
    for file in copy.glob("*.safetensors"):
        tensors = {name: value for name, value in read_tensors(copy).items() if name in _names(file)}
        noisy = {name: value.flip(0) if name.endswith("down_proj.weight") else value for name, value in tensors.items()}
        save_file({name: value.contiguous() for name, value in noisy.items()}, file, metadata={"format": "pt"})
    report = check_text(tiny, copy, SHORT, TWO)
    assert {problem.severity for problem in report.problems} >= {Severity.FAIL}
    assert report.problems[0].prompt == "no thinking"


def _names(file: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return set(opened.keys())


def test_another_template_is_named(tiny, copy):
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|user|>\\n", "<|user|>"))
    report = check_text(tiny, copy, replace(SHORT, max_tokens=2), TWO)
    statements = [problem.statement for problem in report.problems if problem.severity is Severity.FAIL]
    assert "the candidate's tokenizer or chat template makes other tokens of it" in statements


def test_lost_end_tokens_are_named(tiny, copy):
    for name in ("config.json", "generation_config.json"):
        config = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps({**config, "eos_token_id": [984]}))
    (problem, *_) = check_text(tiny, copy, replace(SHORT, max_tokens=2), TWO).problems
    assert (problem.severity, problem.prompt) == (Severity.FAIL, "all")
    assert problem.statement == "end tokens [984] where the source has [984, 991, 993]"


def test_a_checkpoint_without_template_is_refused(tiny, copy):
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="a chat template"):
        check_text(tiny, copy, SHORT, TWO)


def test_an_answer_beyond_the_context_is_refused(tiny):
    with pytest.raises(UsageError, match="--level text"):
        check_text(tiny, tiny, TextOptions(max_tokens=4000), TWO)


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(tiny, monkeypatch):
    needed = check_memory(tiny, SHORT)
    # 4 bytes for each of 3.1 million parameters without the MTP layer
    assert 8e6 < needed < 16e6
    real = text_level.memory()
    monkeypatch.setattr(text_level, "memory", lambda: replace(real, available_bytes=needed - 1))
    with pytest.raises(ResourceError, match="--engine-logprobs"):
        check_text(tiny, tiny, SHORT)
    assert check_memory(tiny, replace(SHORT, dtype="bfloat16")) == needed // 2


def answer(ids: list[int], reason: str = "stop", calls: tuple[str, ...] = ()) -> Answer:
    return Answer(tuple(ids), "", reason, is_loop(ids), calls)


def top(*places: dict[int, float]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([list(place) for place in places]), torch.tensor([list(place.values()) for place in places])


def test_the_first_difference_is_measured_by_the_reference():
    likely = top({1: -0.1, 2: -3.0}, {5: -0.5, 6: -0.75}, {7: -0.1, 8: -4.0})
    assert find_difference([1, 5, 7], [1, 5, 7], likely) == (None, None)
    assert find_difference([1, 5, 7], [1, 6, 9], likely) == (1, 0.25)
    assert find_difference([1, 5, 7], [1, 9, 7], likely) == (1, None)
    assert find_difference([1, 5, 7], [1, 5], likely) == (2, None)


def statements(gap: float | None, reference: Answer, candidate: Answer, place: int | None = 0) -> list[tuple[str, str]]:
    result = TextResult("p", 3, reference, candidate, place, gap)
    return [(problem.severity.value, problem.statement) for problem in judge_answers(result, TextOptions())]


def test_a_near_tie_is_no_problem_and_more_is_one():
    one, other = answer([1, 2]), answer([3, 4])
    assert statements(None, one, one, None) == []
    assert statements(0.5, one, other) == []
    assert [severity for severity, _ in statements(0.51, one, other)] == ["fail"]
    assert [severity for severity, _ in statements(float("nan"), one, other)] == ["fail"]
    assert statements(None, one, other) == [("fail", "token 0 of the answer is not among the source's top 20")]


def test_what_damaged_models_do_behind_a_near_tie_is_a_warning():
    one = answer([1, 2], calls=("f",))
    assert statements(0.1, one, answer([9] * 40, "length")) == [
        ("warn", "the answer repeats itself, the source's does not"),
        ("warn", "no well-formed call of f"),
    ]
    assert statements(0.1, one, answer([3, 4], "length", ("f",))) == [
        ("warn", "the answer has no end token, the source's has one")
    ]
    # the reference does so itself
    assert statements(0.1, answer([8] * 40, "length"), answer([9] * 40, "length")) == []


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1] * 24, True),
        ([1] * 23, False),
        ([5, 6, 7] * 8, True),
        ([9, 9, 5, 6, 7, *([5, 6, 7] * 8), 5], True),
        ([*range(10)] * 4, True),
        ([*range(10)] * 3, False),
        ([*([1] * 30), 2], False),
        ([], False),
    ],
)
def test_a_loop_ends_with_four_copies_of_a_stretch(ids, expected):
    assert is_loop(ids) is expected


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>", ("f",)),
        ("x<tool_call>f</tool_call> <tool_call>g.h\n</tool_call>", ("f", "g.h")),
        ("<tool_call>f\n<arg_key>a</arg_key>\n</tool_call>", ()),
        ("<tool_call>f", ()),
        ("f(1)", ()),
    ],
)
def test_only_well_formed_calls_count(text, names):
    assert tool_calls(text) == names
