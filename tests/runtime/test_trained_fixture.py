"""The runtime on the trained checkpoint, with its real tokenizer and template, against transformers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, Glm4MoeForCausalLM

from runtime.config import EngineConfig
from runtime.engine.completion import complete
from runtime.engine.engine import Engine
from runtime.engine.request import FinishReason, SamplingParams
from runtime.engine.tokenizer import Tokenizer, read_end_token_ids
from runtime.model.loader import LoadedModel, load_model
from runtime.model.mtp import draft_agreement

SPAN = 256  # tokens of a training window
NUM_WINDOWS = 24
REQUEST = "Write the body of this function.\ndef is_empty(self):"


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> LoadedModel:
    return load_model(tiny, EngineConfig(dtype="float32"))


@pytest.fixture(scope="module")
def hf(tiny: Path) -> Glm4MoeForCausalLM:
    return Glm4MoeForCausalLM.from_pretrained(tiny, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def hf_tokenizer(tiny: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="module")
def windows(tiny: Path, held_out: Path) -> torch.Tensor:
    """Held-out text as disjoint windows (NUM_WINDOWS, SPAN)."""
    ids = Tokenizer.open(tiny).encode(held_out.read_text(encoding="utf-8"))
    return torch.tensor(ids[: SPAN * NUM_WINDOWS]).view(NUM_WINDOWS, SPAN)


def test_fixture_tokenizer_equals_transformers(tiny, held_out, hf_tokenizer):
    ours, text = Tokenizer.open(tiny), held_out.read_text(encoding="utf-8")[:20_000]
    ids = ours.encode(text)
    assert hf_tokenizer.encode(text, add_special_tokens=False) == ids
    assert ours.decode(ids) == text


@pytest.mark.parametrize("enable_thinking", [True, False])
def test_fixture_chat_prompt_equals_transformers(tiny, hf_tokenizer, enable_thinking):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": REQUEST}]
    expected = hf_tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=enable_thinking, return_dict=False
    )
    assert Tokenizer.open(tiny).encode_chat(messages, enable_thinking=enable_thinking) == expected


def test_fixture_fp32_logits_equal_transformers(loaded, hf, windows):
    """1.7e-5 is measured; trained logits reach 22, where one fp32 step is 2e-6."""
    expected = hf(windows[:2]).logits
    torch.testing.assert_close(loaded.model.logits(loaded.model(windows[:2])), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("enable_thinking", [True, False])
def test_fixture_chat_answer_equals_transformers_token_for_token(tiny, loaded, hf, enable_thinking):
    tokenizer, how = Tokenizer.open(tiny), EngineConfig(dtype="float32")
    prompt = tokenizer.encode_chat([{"role": "user", "content": REQUEST}], enable_thinking=enable_thinking)
    ids = torch.tensor([prompt])
    expected = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)[
        0, len(prompt) :
    ]
    engine, pieces = Engine(loaded.model, how, read_end_token_ids(tiny)), list[str]()
    completion = complete(engine, tokenizer, prompt, SamplingParams(max_tokens=60), on_text=pieces.append)
    assert list(completion.token_ids) == expected.tolist()
    assert "".join(pieces) == completion.text == tokenizer.decode(completion.token_ids)
    assert (completion.finish_reason is FinishReason.STOP) == (completion.token_ids[-1] in engine.end_token_ids)


def test_fixture_perplexity_is_what_training_recorded(tiny, loaded, windows):
    """The record is of all held-out text and fp32 masters; these windows come out 11 % lower, 25 % is allowed."""
    recorded = json.loads((tiny / "training.json").read_text())["held_out"]["perplexity"]
    logits = torch.cat([loaded.model.logits(loaded.model(part))[:, :-1] for part in windows.split(8)])
    nats = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert abs(math.log(recorded) - nats) < math.log(1.25)


def test_fixture_bf16_perplexity_is_that_of_fp32(tiny, loaded, windows):
    """0.04 % of difference is measured over 24 windows; 1 % is allowed."""
    rounded = load_model(tiny, EngineConfig(dtype="bfloat16"), with_mtp=False)
    nats = [
        F.cross_entropy(part.model.logits(part.model(windows[:8]))[:, :-1].flatten(0, 1), windows[:8, 1:].flatten())
        for part in (loaded, rounded)
    ]
    assert abs(nats[0] - nats[1]) < math.log(1.01)


def test_fixture_mtp_drafts_agree_as_often_as_training_recorded(tiny, loaded, windows):
    """A broken MTP layer agrees in a few per cent of the positions."""
    recorded = json.loads((tiny / "training.json").read_text())["held_out"]["draft_agreement"]
    assert abs(draft_agreement(loaded.model, loaded.mtp, windows).share - recorded) < 0.05
