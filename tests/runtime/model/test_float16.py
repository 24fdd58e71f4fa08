"""Compute in fp16: as near to fp32 as its bits say, and an overflow is refused, not answered from."""

import copy
from pathlib import Path

import pytest
import torch
from quantizing import checkpoint, quantize

from converters.errors import InputError
from runtime.config import EngineConfig
from runtime.engine.engine import Engine
from runtime.engine.request import SamplingParams
from runtime.model.loader import load_model

# of the logits' spread: an eighth of what test_decoder_parity allows for bf16, which has 8 bits where fp16 has 11
SHARE = 0.05 / 8
IDS = torch.randint(0, 48, (2, 33), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def logits(folder: Path, dtype: str, **choices: str) -> torch.Tensor:
    model = load_model(folder, EngineConfig(dtype=dtype, **choices)).model
    return model.logits(model(IDS))


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the median difference as a share of the spread: a token that is routed elsewhere may be far off."""
    return float((found - expected).abs().median() / expected.std())


@pytest.mark.parametrize("backend", ["vanilla", "batched", "cutlass"])
def test_fp16_stays_eight_times_as_near_to_fp32_as_bf16(make_checkpoint, backend: str) -> None:
    source = make_checkpoint()
    exact, rounded = source.hf(IDS).logits, logits(source.folder, "float16", moe_backend=backend)
    assert rounded.dtype is torch.float32
    assert 0 < off(rounded, exact) < SHARE
    assert off(logits(source.folder, "bfloat16", moe_backend=backend), exact) > 2 * off(rounded, exact)


def test_fp16_is_near_to_transformers_in_fp16(make_checkpoint) -> None:
    """Both round, each by as much."""
    source = make_checkpoint()
    theirs = copy.deepcopy(source.hf).half()(IDS).logits.float()
    assert off(logits(source.folder, "float16"), theirs) < 2 * SHARE


@pytest.mark.parametrize("scheme", ["fp8-block", "fp8", "int8", "nvfp4-weight-only"])
def test_quantized_weights_are_multiplied_in_fp16(tmp_path: Path, scheme: str) -> None:
    quantize(checkpoint(tmp_path / "src"), tmp_path / "dst", scheme)
    exact = logits(tmp_path / "dst", "float32")
    for backend in ("vanilla", "batched"):
        assert 0 < off(logits(tmp_path / "dst", "float16", moe_backend=backend), exact) < SHARE


def test_overflow_of_fp16_is_refused(make_checkpoint) -> None:
    source = make_checkpoint()

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.down_proj.weight"] *= 1e5

    source.edit(enlarge)
    for dtype in ("float32", "bfloat16"):
        engine = EngineConfig(dtype=dtype)
        assert list(Engine(load_model(source.folder, engine).model, engine, ()).generate([5, 17], SamplingParams()))
    engine = EngineConfig(dtype="float16")
    with pytest.raises(InputError, match=r"logits: expected finite numbers, found NaN or Inf\. .* overflows"):
        list(Engine(load_model(source.folder, engine).model, engine, ()).generate([5, 17], SamplingParams()))
