"""vLLM on what we write: its own loader on every scheme and format, and its answers on the unquantized model.

Run with GLM4MOE_VLLM_PYTHON set to an interpreter that has vLLM 0.32 for the CPU.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import read_tensors
from safetensors import safe_open
from safetensors.torch import save_file

from runtime.config import EngineConfig
from runtime.engine.engine import Engine
from runtime.engine.request import SamplingParams
from runtime.engine.tokenizer import Tokenizer, read_end_token_ids
from runtime.model.loader import load_model
from tests.consumers.cases import CASES, engines_of

REQUEST = "Write the body of this function.\ndef is_empty(self):"
LOST = "model.layers.1.mlp.experts.2.up_proj.weight_global_scale"
LOST_PARAMETER = "model.layers.1.mlp.experts.routed_experts.w13_weight_global_scale"
# what vLLM has no place for, by case: all in ModelOpt's format, where its experts know scales of whole tensors only
REFUSED = {
    "fp8, modelopt": "shape '[]' is invalid for input of size",
    "fp8-block, modelopt": "shape '[]' is invalid for input of size",
}
# of the attention: vLLM sets what a checkpoint does not have, and never expects the others
OWN = re.compile(r".*\.attn\.(?:(?:q|prob)_scale|[kvq]_zero_point)")
OWN_WITHOUT_CACHE = re.compile(r".*\.attn\.[kv]_scale")
# parameters of inputs that are made whether or not inputs are quantized, and dropped before use where they are not
OWN_WEIGHT_ONLY = re.compile(r".*(?:\.input_scale|_input_scale|_input_global_scale)")


@pytest.mark.parametrize("name", CASES)
def test_the_plan_names_vllm_where_it_loads_the_result(name, source, stats):
    assert ("vLLM" in engines_of(source, CASES[name], stats)) is (name not in REFUSED)


@pytest.fixture(scope="session")
def report(
    vllm_run: Callable[..., None], result: Callable[[str], Path], source: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What one run of `vllm_load.py` over all cases and the source says."""
    folder = tmp_path_factory.mktemp("vllm")
    path, damaged = folder / "report.json", shutil.copytree(result("nvfp4, compressed-tensors"), folder / "damaged")
    (file,) = damaged.glob("*.safetensors")
    save_file({name: value for name, value in read_tensors(damaged).items() if name != LOST}, file)
    vllm_run("vllm_load.py", path, source, damaged, *map(result, CASES))
    return json.loads(path.read_text())


def left_alone(name: str) -> list[re.Pattern[str]]:
    """Return which parameters vLLM itself takes care of."""
    patterns = [OWN]
    if "kv_cache" not in CASES[name].options:
        patterns.append(OWN_WITHOUT_CACHE)
    if "nvfp4-weight-only" in CASES[name].scheme:
        patterns.append(OWN_WEIGHT_ONLY)
    return patterns


def stored_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


@pytest.mark.vllm
@pytest.mark.parametrize("name", [name for name in CASES if name not in REFUSED])
def test_vllm_fills_every_parameter_with_what_the_files_have(name, report, result):
    used: set[str] = set()
    for part in ("model", "mtp"):
        found = report[name][part]
        assert "error" not in found, found
        # the MTP model never has cache scales
        patterns = [*left_alone(name), *([OWN_WITHOUT_CACHE] if part == "mtp" else [])]
        unfilled = [p for p in found["unfilled"] if not any(pattern.fullmatch(p) for pattern in patterns)]
        assert unfilled == []
        assert found["differing"] == []
        used |= set(found["used"])
    # of weights that vLLM fuses it keeps the shape of the last
    unread = {n for n in stored_names(result(name)) - used if not n.endswith("weight_shape")}
    assert unread == set()


@pytest.mark.vllm
def test_vllm_fills_every_parameter_of_the_unquantized_source(report, source):
    used: set[str] = set()
    for part in ("model", "mtp"):
        found = report["source"][part]
        assert (found["unfilled"], found["differing"]) == ([], [])
        used |= set(found["used"])
    assert used == stored_names(source)


@pytest.mark.vllm
def test_a_tensor_that_is_not_there_is_noticed(report):
    unfilled = [name for name in report["damaged"]["model"]["unfilled"] if not OWN_WITHOUT_CACHE.fullmatch(name)]
    assert [name for name in unfilled if not OWN.fullmatch(name)] == [LOST_PARAMETER]


@pytest.mark.vllm
@pytest.mark.parametrize("name", REFUSED)
def test_vllm_still_refuses_what_we_say_it_refuses(name, report):
    """If it no longer does, the list of engines is out of date."""
    assert REFUSED[name] in report[name]["model"]["error"]


@pytest.mark.vllm
def test_vllm_continues_the_trained_model_as_our_runtime_does(vllm_run, tiny, held_out, tmp_path):
    """In fp32: 8e-6 nats of difference are measured; trained logits reach 22, where one fp32 step is 2e-6."""
    tokenizer = Tokenizer.open(tiny)
    ids = tokenizer.encode(held_out.read_text(encoding="utf-8"))
    chat = tokenizer.encode_chat([{"role": "user", "content": REQUEST}], enable_thinking=True)
    prompts = [ids[:48], ids[1000:1064], chat]
    path = tmp_path / "report.json"
    vllm_run("vllm_generate.py", path, tiny, "float32", json.dumps(prompts))
    how = EngineConfig(dtype="float32")
    model = load_model(tiny, how, with_mtp=False).model
    engine = Engine(model, how, read_end_token_ids(tiny))
    for prompt, theirs in zip(prompts, json.loads(path.read_text()), strict=True):
        scores = model.logits(model(torch.tensor([prompt])))[0].log_softmax(-1)
        expected = scores[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(theirs["logprobs"]), expected, rtol=0, atol=1e-4)
        ours = engine.generate(prompt, SamplingParams(max_tokens=len(theirs["ids"])))
        assert [token.token_id for token in ours] == theirs["ids"]
