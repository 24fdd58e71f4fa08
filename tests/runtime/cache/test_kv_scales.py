from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from converters.config import read_json
from converters.errors import InputError, UsageError
from converters.source import open_source
from runtime.cache.kv_scales import read_kv_scales
from runtime.config import EngineConfig
from runtime.model.decoder import new_cache
from runtime.model.loader import load_model
from tests.builders import read_tensors, write_checkpoint
from tests.quantized import DIALECTS, quantized_checkpoint

# of the fixture: three decoder layers, then the MTP layer
KEYS, VALUES = [0.5, 0.25, 0.125], [2.0, 1.5, 0.75]


def name(layer: int, suffix: str) -> str:
    return f"model.layers.{layer}.self_attn.{suffix}"


def of_layers(key: str, value: str) -> dict[str, torch.Tensor]:
    scales = ((key, KEYS), (value, VALUES))
    return {name(layer, suffix): torch.tensor(found[layer]) for suffix, found in scales for layer in range(3)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[dict[str, torch.Tensor]], Path]:
    """A function that writes a quantized checkpoint with these tensors besides."""

    def write(more: dict[str, torch.Tensor]) -> Path:
        folder, _ = quantized_checkpoint(tmp_path / "fp8", DIALECTS["ct-fp8-channel"])
        config = read_json(folder / "config.json")
        return write_checkpoint(tmp_path / "with scales", read_tensors(folder) | more, config)

    return write


@pytest.mark.parametrize(
    "names",
    [
        ("k_scale", "v_scale"),
        ("k_proj.k_scale", "v_proj.v_scale"),
        # as compressed-tensors wrote them first
        ("k_proj.output_scale", "v_proj.output_scale"),
    ],
)
def test_scales_of_every_dialect_are_read(checkpoint, names):
    folder = checkpoint(of_layers(*names) | {name(1, "q_proj.output_scale"): torch.tensor(9.0)})
    with open_source(folder) as source:
        scales, notes = read_kv_scales(source)
    assert scales.tolist() == [[key, value] for key, value in zip([*KEYS, 1.0], [*VALUES, 1.0], strict=True)]
    assert notes == ()


def test_model_and_drafts_get_the_scales_of_their_layers(checkpoint):
    scales = of_layers("k_scale", "v_scale") | {name(3, "k_scale"): torch.tensor([0.0625])}
    loaded = load_model(checkpoint(scales), EngineConfig(dtype="float32", kv_cache_dtype="fp8"))
    assert not any("scale" in note for note in loaded.notes)
    cache = new_cache(loaded.model, 4)
    for layer in range(3):
        assert cache.layer(layer).scales.tolist() == [KEYS[layer], VALUES[layer]]
    assert new_cache(loaded.model, 4, num_layers=1).layer(0).scales.tolist() == [0.0625, 1]


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({}, "no scale"),
        ({name(3, "k_scale"): torch.tensor(0.5)}, "no scale for 6 of 6 parts"),
        ({name(2, "k_scale"): torch.tensor(0.5)}, "no scale for 5 of 6 parts"),
    ],
)
def test_a_checkpoint_without_scales_says_so(checkpoint, more, what):
    loaded = load_model(checkpoint(more), EngineConfig(dtype="float32", kv_cache_dtype="fp8"))
    note = f"The checkpoint has {what} of an FP8 KV cache: keys and values are rounded by a scale of 1."
    assert note in loaded.notes
    plain = load_model(checkpoint(more), EngineConfig(dtype="float32"))
    assert plain.model.kv_scales_L2 is None
    assert note not in plain.notes


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_without_meaning_is_refused(checkpoint, value):
    folder = checkpoint({name(1, "k_scale"): torch.tensor(value)})
    with open_source(folder) as source, pytest.raises(InputError) as error:
        read_kv_scales(source)
    assert str(error.value) == f"tensor {name(1, 'k_scale')}: expected a finite number above zero, found {value}"


def test_scales_of_heads_are_refused(checkpoint):
    folder = checkpoint({name(1, "v_scale"): torch.ones(2, 1, 1)})
    with open_source(folder) as source, pytest.raises(UsageError) as error:
        read_kv_scales(source)
    assert str(error.value) == (
        "kv_cache_dtype 'fp8': expected one scale for all heads of a layer, found 2 in "
        f"{name(1, 'v_scale')}. Use --kv-cache-dtype auto."
    )
