"""The quantizers give the bytes of their plain twins, however rows are cut into blocks, whatever threads there are."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import quantization_twin as twin
import torch
from quantization_peers import finite_as, hard_weights

from converters.numerics import nvfp4, nvfp4_search, workspace
from converters.quant.scheme import Arithmetic, ScaleSearch
from converters.transforms.quantize import (
    QuantizeFp8Block,
    QuantizeFp8Channel,
    QuantizeFp8Tensor,
    QuantizeInt8,
    QuantizeInt8Packed,
    QuantizeNvfp4,
)
from converters.transforms.rows import RowTransform

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAMES = list(hard_weights(4, 16))
Twin = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]


def pairs(arithmetic: Arithmetic) -> dict[str, tuple[RowTransform, Twin]]:
    """Return every transform with its twin, by name."""
    found: dict[str, tuple[RowTransform, Twin]] = {
        "channel": (QuantizeFp8Channel(arithmetic), lambda w, _: twin.fp8_channel(w, arithmetic)),
        "tensor": (QuantizeFp8Tensor(arithmetic), lambda w, m: twin.fp8_tensor(w, m, arithmetic)),
        "block": (QuantizeFp8Block(arithmetic), lambda w, _: twin.fp8_block(w, arithmetic)),
        "inverse": (
            QuantizeFp8Block(arithmetic, inverse=True),
            lambda w, _: twin.fp8_block(w, arithmetic, inverse=True),
        ),
        "int8": (QuantizeInt8(arithmetic), lambda w, _: twin.int8(w, arithmetic)),
    }
    for search in ScaleSearch:
        found[f"nvfp4 {search}"] = (
            QuantizeNvfp4(arithmetic, search),
            lambda w, m, search=search: twin.nvfp4(w, m, arithmetic, search),
        )
    return found


ALL = {f"{arithmetic} {name}": pair for arithmetic in Arithmetic for name, pair in pairs(arithmetic).items()}


def largest(weight: torch.Tensor) -> torch.Tensor:
    return weight.abs().max().float().view(1, 1)


def bits(blocks: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [block.contiguous().view(-1).view(torch.uint8) for block in blocks]


def equal(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> bool:
    return len(ours) == len(theirs) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits_of)
        for a, b, bits_of in zip(ours, theirs, zip(bits(ours), bits(theirs), strict=True), strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_bytes_are_those_of_the_twin(name: str, dtype: torch.dtype) -> None:
    transform, plain = ALL[name]
    for weight in NAMES:
        weight_RC = finite_as(hard_weights(131, 272)[weight], dtype)
        before = weight_RC.clone()
        assert equal(transform(weight_RC, largest(weight_RC)), plain(weight_RC, largest(weight_RC))), weight
        assert torch.equal(before.view(torch.uint8), weight_RC.view(torch.uint8)), f"{weight} was changed"


@pytest.mark.parametrize("name", ALL)
def test_bytes_are_those_of_the_twin_when_the_buffers_are_used_many_times(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_RC = (torch.randn(300, 336, generator=torch.Generator().manual_seed(3)) * 0.02).to(torch.bfloat16)
    transform, plain = ALL[name]
    expected = plain(weight_RC, largest(weight_RC))
    for size in (1, 1000, 5000):
        monkeypatch.setattr(workspace, "CHUNK", size)
        monkeypatch.setattr(nvfp4_search, "_CHUNK", size)
        assert equal(transform(weight_RC, largest(weight_RC)), expected)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("step", [128, 256])
def test_blocks_of_rows_make_the_same_bytes(name: str, step: int) -> None:
    weight_RC = (torch.randn(387, 304, generator=torch.Generator().manual_seed(4)) * 0.02).to(torch.bfloat16)
    transform, _ = ALL[name]
    whole = transform(weight_RC, largest(weight_RC))
    parts = [transform(weight_RC[start : start + step], largest(weight_RC)) for start in range(0, 387, step)]
    for number, output in enumerate(whole):
        made = [part[number] for part in parts]
        joined = made[0] if output.shape == (1, 1) else torch.cat(made)
        assert equal((joined,), (output,))


@pytest.mark.parametrize("name", [name for name in ALL if not name.endswith(("block", "inverse"))])
def test_rows_alone_make_the_same_bytes(name: str) -> None:
    """A vector operation may treat the end of a row in another way than its middle."""
    weight_RC = torch.randn(5, 16 * 21, generator=torch.Generator().manual_seed(5))
    transform, _ = ALL[name]
    whole = transform(weight_RC, largest(weight_RC))
    for row in range(len(weight_RC)):
        alone = transform(weight_RC[row : row + 1], largest(weight_RC))
        assert equal(alone, tuple(output if output.shape == (1, 1) else output[row : row + 1] for output in whole))


def test_threads_do_not_disturb_each_other() -> None:
    g = torch.Generator().manual_seed(6)
    weights = [torch.randn(64, 16 * (20 + n), generator=g).to(torch.bfloat16) for n in range(24)]
    transform = QuantizeNvfp4(Arithmetic.FLOAT32, ScaleSearch.MSE)
    expected = [transform(weight, largest(weight)) for weight in weights]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            made = pool.map(lambda weight: transform(weight, largest(weight)), weights)
            assert all(equal(*both) for both in zip(made, expected, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_of_torch_do_not_change_bytes(threads: int) -> None:
    weight_RC = torch.randn(257, 1024, generator=torch.Generator().manual_seed(8)).to(torch.bfloat16)
    before = torch.get_num_threads()
    expected = {name: plain(weight_RC, largest(weight_RC)) for name, (_, plain) in ALL.items()}
    torch.set_num_threads(threads)
    try:
        assert all(equal(ALL[name][0](weight_RC, largest(weight_RC)), expected[name]) for name in ALL)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("columns", [1, 3, 4, 5, 127, 128])
def test_int32_words_hold_the_codes_low_byte_first(columns: int) -> None:
    weight_RC = torch.randn(6, columns, generator=torch.Generator().manual_seed(9))
    words_RW, scale = QuantizeInt8Packed(Arithmetic.FLOAT32, 0)(weight_RC)
    codes, expected_scale = twin.int8(weight_RC, Arithmetic.FLOAT32)
    assert torch.equal(scale, expected_scale)
    for column in range(words_RW.shape[1] * 4):
        found = (words_RW[:, column // 4] >> (8 * (column % 4))) & 0xFF
        assert torch.equal(found, codes[:, column].int() + 128 if column < columns else torch.zeros_like(found))


def test_every_e2m1_boundary_is_rounded_as_the_format_says() -> None:
    """Codes, midpoints, the floats next to them, both signs and zeros, beyond the end: in both nibbles."""
    values = torch.tensor([*twin.E2M1, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 1e30, 2.0**-149, 2.0**-126])
    near = torch.cat([values, values.nextafter(torch.tensor(9e9)), values.nextafter(torch.tensor(-9e9))])
    every = torch.cat([near, -near])
    for low, high in ((every, every.flip(0)), (every.flip(0), every)):
        scaled_RC = torch.stack([low, high], dim=1).reshape(1, -1)
        packed_RB = torch.empty(1, len(every), dtype=torch.uint8)
        expected = twin.e2m1_codes(scaled_RC)
        nvfp4.encode_pairs(scaled_RC.clone(), packed_RB)
        assert torch.equal(packed_RB & 0xF, expected[:, 0::2])
        assert torch.equal(packed_RB >> 4, expected[:, 1::2])
