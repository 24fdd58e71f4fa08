import json

import pytest
import torch

from converters.errors import ConfigError, InputError, UsageError
from runtime.config import EngineConfig
from runtime.engine.engine import Engine
from runtime.engine.request import FinishReason, SamplingParams
from runtime.engine.tokenizer import read_end_token_ids
from runtime.model.loader import load_model

PROMPT = [5, 17, 40, 3, 77, 8, 23]


def run(engine: Engine, prompt: list[int], **params) -> tuple[list[int], FinishReason | None]:
    tokens = list(engine.generate(prompt, SamplingParams(**params)))
    assert all(token.finish_reason is None for token in tokens[:-1])
    return [token.token_id for token in tokens], tokens[-1].finish_reason


def open_engine(folder, **config) -> Engine:
    engine = EngineConfig(dtype="float32", **config)
    return Engine(load_model(folder, engine).model, engine, read_end_token_ids(folder))


@pytest.mark.parametrize("prefill_chunk_tokens", [1, 3, 512])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_engine_greedy_tokens_equal_transformers_generate(make_checkpoint, seed, prefill_chunk_tokens):
    checkpoint = make_checkpoint(seed=seed, n_group=2)
    expected = checkpoint.hf.generate(
        torch.tensor([PROMPT]), attention_mask=torch.ones(1, 7), max_new_tokens=40, do_sample=False
    )[0, 7:].tolist()
    engine = open_engine(checkpoint.folder, prefill_chunk_tokens=prefill_chunk_tokens)
    ids, reason = run(engine, PROMPT, max_tokens=40)
    assert ids == expected
    assert reason is (FinishReason.STOP if expected[-1] in (1, 2) else FinishReason.LENGTH)


def test_engine_stops_at_every_end_token(make_checkpoint):
    checkpoint = make_checkpoint()
    free, _ = run(open_engine(checkpoint.folder), PROMPT, max_tokens=12)
    path = checkpoint.folder / "generation_config.json"
    for position in (0, 5):
        path.write_text(json.dumps({"eos_token_id": free[position]}))
        ids, reason = run(open_engine(checkpoint.folder), PROMPT, max_tokens=12)
        assert ids == free[: free.index(free[position]) + 1]
        assert reason is FinishReason.STOP


def test_engine_stops_when_the_context_is_full(make_checkpoint):
    engine = open_engine(make_checkpoint().folder, max_context_tokens=10)
    ids, reason = run(engine, PROMPT, max_tokens=50)
    assert (len(ids), reason) == (3, FinishReason.CONTEXT)


def test_engine_context_is_the_models_unless_less_is_asked_for(make_checkpoint):
    folder = make_checkpoint().folder
    assert open_engine(folder).max_context_tokens == 128
    with pytest.raises(UsageError, match=r"^max_context_tokens: expected at most 128, found 129$"):
        open_engine(folder, max_context_tokens=129)


def test_engine_end_token_wins_over_the_last_allowed_token(make_checkpoint):
    folder = make_checkpoint().folder
    (first,), reason = run(open_engine(folder), PROMPT, max_tokens=1)
    assert reason is FinishReason.LENGTH
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [first]}))
    assert run(open_engine(folder), PROMPT, max_tokens=1) == ([first], FinishReason.STOP)


def test_engine_sampling_is_determined_by_the_seed(make_checkpoint):
    engine = open_engine(make_checkpoint().folder)
    runs = [run(engine, PROMPT, max_tokens=30, temperature=1.5, seed=seed)[0] for seed in (3, 3, 4)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt: expected at least one token, found none"),
        ([1] * 128, "prompt: expected fewer than 128 tokens, found 128"),
        ([3, 96], "prompt: expected token ids from 0 to 95, found 96. The tokenizer does not belong to this model."),
    ],
)
def test_engine_prompt_that_cannot_be_run_is_refused_at_once(make_checkpoint, prompt, message):
    engine = open_engine(make_checkpoint().folder)
    with pytest.raises(UsageError) as error:
        engine.generate(prompt, SamplingParams())
    assert str(error.value) == message


def test_engine_nan_weight_ends_in_an_error_not_in_text(make_checkpoint):
    checkpoint = make_checkpoint()
    checkpoint.edit(lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(InputError, match="logits: expected finite numbers"):
        run(open_engine(checkpoint.folder), PROMPT)


@pytest.mark.parametrize(
    ("generation", "ids"), [(None, {1, 2}), ({}, {1, 2}), ({"eos_token_id": 9}, {1, 2, 9}),
                            ({"eos_token_id": [9, 2]}, {1, 2, 9}), ({"eos_token_id": None}, {1, 2})],
)  # fmt: skip
def test_end_tokens_are_those_of_both_configs(make_checkpoint, generation, ids):
    folder = make_checkpoint().folder
    path = folder / "generation_config.json"
    path.unlink(missing_ok=True)
    if generation is not None:
        path.write_text(json.dumps(generation))
    assert read_end_token_ids(folder) == ids


def test_end_tokens_that_are_no_ids_are_refused(make_checkpoint):
    folder = make_checkpoint().folder
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id: expected token ids, found '</s>'$"):
        read_end_token_ids(folder)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match="expected valid JSON"):
        read_end_token_ids(folder)
