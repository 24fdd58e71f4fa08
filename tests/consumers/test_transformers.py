"""transformers 5 on what we write: which results it loads rightly, and what becomes of the others.

It computes with the weights that `convert --dequantize` restores, bit for bit, or it is on the list below.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import disable_quantization
from transformers import Glm4MoeForCausalLM

from converters.convert import ConvertOptions, plan_convert
from converters.job import run
from converters.pipeline import RunOptions
from converters.quant.scheme import Format
from converters.source import open_source
from runtime.config import EngineConfig
from runtime.engine.tokenizer import Tokenizer
from runtime.model.loader import load_model
from tests.consumers.cases import CASES, IDS, Case, engines_of, quantized

READ = [
    "fp8, compressed-tensors",
    "fp8, kv-cache",
    "fp8-static, compressed-tensors",
    "int8-weight-only, compressed-tensors",
    "int8-weight-only g32",
    "int8-weight-only g64",
    "int8-weight-only g128",
]
REFUSED = {
    "fp8-block, compressed-tensors": "issues during automatic conversion",
    "int8, compressed-tensors": "issues during automatic conversion",
    "nvfp4, modelopt": "ignore_mismatched_sizes",
    "nvfp4-weight-only, modelopt": "ignore_mismatched_sizes",
}
# nothing is missing, nothing is raised, and the logits are another model's
WRONG = [
    "nvfp4, compressed-tensors",
    "nvfp4-weight-only, compressed-tensors",
    "mixed",
    "fp8, modelopt",
    "fp8-block, modelopt",
    "fp8-static, modelopt",
]
TINY = {"fp8": {}, "int8-weight-only": {}, "int8-weight-only g64": {"group_size": "64"}}


def load(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Glm4MoeForCausalLM:
    """Return the model as transformers has it; its inputs are not quantized, for the weights are what is compared."""
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager", "output_loading_info": True}
    model, info = Glm4MoeForCausalLM.from_pretrained(folder, **options)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return model.eval().apply(disable_quantization)


@torch.inference_mode()
def logits(folder: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    return load(folder)(ids).logits


def dequantized(folder: Path, dst: Path) -> Path:
    with open_source(folder) as source:
        run(plan_convert(source, ConvertOptions(dequantize=True, dtype="bfloat16")), dst, RunOptions(1), lambda _: None)
    return dst


@pytest.mark.parametrize("name", READ)
def test_transformers_computes_with_the_weights_we_restore(name, result, tmp_path):
    folder = result(name)
    assert torch.equal(logits(folder), logits(dequantized(folder, tmp_path / "plain")))


def test_transformers_reads_the_deepseek_format(result, tmp_path):
    folder = result("fp8-block, deepseek")
    assert torch.equal(logits(folder), logits(dequantized(folder, tmp_path / "plain")))


@pytest.mark.parametrize("name", REFUSED)
def test_transformers_refuses(name, result):
    """If it no longer does, the list of engines is out of date."""
    with pytest.raises(RuntimeError, match=REFUSED[name]):
        load(result(name))


@pytest.mark.parametrize("name", WRONG)
def test_transformers_is_silently_wrong(name, result, tmp_path):
    """If it no longer is, the list of engines is out of date."""
    folder = result(name)
    found, expected = logits(folder), logits(dequantized(folder, tmp_path / "plain"))
    assert (found - expected).norm() > 0.5 * expected.norm()


@pytest.mark.parametrize("name", [*READ, *REFUSED, *WRONG, "fp8-block, deepseek"])
def test_the_plan_names_transformers_where_it_reads_the_result(name, source, stats):
    is_read = name in {*READ, "fp8-block, deepseek"}
    assert ("transformers" in engines_of(source, CASES[name], stats)) is is_read


def test_every_scheme_and_format_is_accounted_for():
    """What differs in the MTP layer alone is all the same to transformers, which does not load that layer."""
    variants = {name for name, case in CASES.items() if "mtp" in case.options}
    others = {"fp8-block, deepseek", "fp8-static, kv-cache, modelopt"}
    assert {*READ, *REFUSED, *WRONG, *others, *variants} == CASES.keys()


@pytest.fixture(scope="module")
def windows(tiny: Path, held_out: Path) -> torch.Tensor:
    ids = Tokenizer.open(tiny).encode(held_out.read_text(encoding="utf-8"))
    return torch.tensor(ids[:512]).view(2, 256)


@pytest.mark.parametrize("name", TINY)
def test_transformers_computes_with_the_weights_we_restore_of_the_trained_model(name, tiny, windows, tmp_path):
    case = Case(name, name.split()[0], Format.COMPRESSED_TENSORS, TINY[name])
    folder = quantized(tiny, tmp_path / "quantized", case, None)
    assert torch.equal(logits(folder, windows), logits(dequantized(folder, tmp_path / "plain"), windows))


@torch.inference_mode()
def test_transformers_logits_of_the_trained_model_in_fp8_are_those_of_the_runtime(
    tiny: Path, windows: torch.Tensor, tmp_path: Path, tally: Callable[[str], None]
) -> None:
    """In fp32, where transformers rounds no weight. Trained logits reach 22, where one fp32 step is 2e-6."""
    folder = quantized(tiny, tmp_path / "fp8", Case("fp8", "fp8"), None)
    model = load_model(folder, EngineConfig(dtype="float32"), with_mtp=False).model
    ours, theirs = model.logits(model(windows)), load(folder, torch.float32)(windows).logits
    tally(f"fp8 logits, transformers and runtime: at most {float((ours - theirs).abs().max()):.1e} apart")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
