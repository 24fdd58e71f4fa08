import pytest

from converters.errors import UsageError
from runtime.config import EngineConfig, resolve_device, resolve_dtype


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float64"}, "dtype 'float64': expected one of float32, bfloat16, float16"),
        ({"device": "tpu"}, "device 'tpu': expected one of cpu, cuda"),
        ({"moe_backend": "fast"}, "moe_backend 'fast': expected one of auto, vanilla, batched, cutlass, triton"),
        (
            {"moe_backend": "triton"},
            "moe_backend 'triton': expected a GPU of compute capability 9.0 or later, or TRITON_INTERPRET=1, found the "
            "CPU. Use --moe-backend batched.",
        ),
        ({"kernels": "fast"}, "kernels 'fast': expected one of auto, torch, triton"),
        (
            {"kernels": "triton"},
            "kernels 'triton': expected a GPU of compute capability 9.0 or later, or TRITON_INTERPRET=1, "
            "found the CPU. "
            "Use --kernels torch.",
        ),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype 'int8': expected one of auto, fp8"),
        ({"fused_shared_experts": "yes"}, "fused_shared_experts 'yes': expected one of auto, on, off"),
        (
            {"moe_backend": "vanilla", "fused_shared_experts": "on"},
            "moe_backend 'vanilla': expected batched, cutlass or triton with fused_shared_experts 'on', found experts "
            "that run one after the other",
        ),
        (
            {"moe_backend": "vanilla", "moe_deterministic": True},
            "moe_backend 'vanilla': expected batched or triton with moe_deterministic, found vanilla",
        ),
        (
            {"moe_backend": "cutlass", "moe_deterministic": True},
            "moe_backend 'cutlass': expected batched or triton with moe_deterministic, found cutlass",
        ),
        (
            {"moe_backend": "batched", "moe_deterministic": True, "fused_shared_experts": "off"},
            "fused_shared_experts 'off': expected on or auto with moe_deterministic, found off",
        ),
        ({"max_context_tokens": 0}, "max_context_tokens: expected at least 1, found 0"),
        ({"prefill_chunk_tokens": -1}, "prefill_chunk_tokens: expected at least 1, found -1"),
    ],
)
def test_engine_config_unsupported_value_is_refused_by_name(changes, message):
    with pytest.raises(UsageError) as error:
        EngineConfig(**changes)
    assert str(error.value) == message


def test_engine_config_triton_is_taken_by_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for dtype in ("bfloat16", "float16", "float32"):
        assert EngineConfig(moe_backend="triton", dtype=dtype).moe_backend == "triton"
    assert EngineConfig(kernels="triton").kernels == "triton"


def test_engine_config_kernels_ask_for_the_gpu_that_they_need(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 9))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Some GPU")
    assert EngineConfig(device="cuda", kernels="auto").kernels == "auto"
    with pytest.raises(UsageError, match=r"^kernels 'triton': .* found Some GPU\. Use --kernels torch\.$"):
        EngineConfig(device="cuda", kernels="triton")


@pytest.mark.parametrize(
    ("backend", "dtype", "capability", "message"),
    [
        (
            "triton",
            "bfloat16",
            (8, 9),
            "moe_backend 'triton': expected a GPU of compute capability 9.0 or later, or TRITON_INTERPRET=1, found "
            "Some GPU. Use --moe-backend batched.",
        ),
        (
            "cutlass",
            "bfloat16",
            (7, 5),
            "moe_backend 'cutlass': expected bfloat16 on a GPU of compute capability 8.0 or later, found bfloat16 on "
            "Some GPU. Use --moe-backend batched.",
        ),
        (
            "cutlass",
            "float32",
            (9, 0),
            "moe_backend 'cutlass': expected bfloat16 on a GPU of compute capability 8.0 or later, found float32 on "
            "Some GPU. Use --moe-backend batched.",
        ),
        (
            "triton",
            "float32",
            (9, 0),
            "moe_backend 'triton': expected bfloat16 or float16 on a GPU, found float32. Use --dtype bfloat16, or "
            "--moe-backend batched.",
        ),
        (
            "cutlass",
            "float16",
            (9, 0),
            "moe_backend 'cutlass': expected bfloat16 on a GPU of compute capability 8.0 or later, found float16 on "
            "Some GPU. Use --moe-backend batched.",
        ),
        ("triton", "float16", (9, 0), None),
        ("triton", "bfloat16", (9, 0), None),
        ("cutlass", "bfloat16", (8, 0), None),
    ],
)
def test_engine_config_backend_asks_for_the_gpu_that_it_needs(monkeypatch, backend, dtype, capability, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Some GPU")
    if message is None:
        assert EngineConfig(device="cuda", dtype=dtype, moe_backend=backend).moe_backend == backend
        return
    with pytest.raises(UsageError) as error:
        EngineConfig(device="cuda", dtype=dtype, moe_backend=backend)
    assert str(error.value) == message


def test_engine_config_cuda_without_device_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match=r"^device 'cuda': expected a CUDA device, found none\. Use --device cpu\.$"):
        EngineConfig(device="cuda")


@pytest.mark.parametrize(
    ("name", "checkpoint_dtype", "resolved"),
    [
        ("auto", "bfloat16", "bfloat16"),
        ("auto", "float32", "float32"),
        ("auto", "float16", "float32"),
        ("float32", "bfloat16", "float32"),
        ("float16", "bfloat16", "float16"),
    ],
)
def test_resolve_dtype_auto_keeps_the_checkpoints(name, checkpoint_dtype, resolved):
    assert resolve_dtype(name, checkpoint_dtype) == resolved


@pytest.mark.parametrize(("available", "device"), [(True, "cuda"), (False, "cpu")])
def test_resolve_device_auto_takes_cuda_if_there_is_one(monkeypatch, available, device):
    monkeypatch.setattr("torch.cuda.is_available", lambda: available)
    assert resolve_device("auto") == device
    assert resolve_device("cpu") == "cpu"
