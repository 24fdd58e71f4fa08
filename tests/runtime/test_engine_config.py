import pytest

from converters.errors import UsageError
from runtime.config import EngineConfig, resolve_device, resolve_dtype


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "dtype 'float16': expected one of float32, bfloat16"),
        ({"device": "tpu"}, "device 'tpu': expected one of cpu, cuda"),
        ({"moe_backend": "triton"}, "moe_backend 'triton': expected one of vanilla"),
        ({"max_context_tokens": 0}, "max_context_tokens: expected at least 1, found 0"),
        ({"prefill_chunk_tokens": -1}, "prefill_chunk_tokens: expected at least 1, found -1"),
    ],
)
def test_engine_config_unsupported_value_is_refused_by_name(changes, message):
    with pytest.raises(UsageError) as error:
        EngineConfig(**changes)
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
    ],
)
def test_resolve_dtype_auto_keeps_the_checkpoints(name, checkpoint_dtype, resolved):
    assert resolve_dtype(name, checkpoint_dtype) == resolved


@pytest.mark.parametrize(("available", "device"), [(True, "cuda"), (False, "cpu")])
def test_resolve_device_auto_takes_cuda_if_there_is_one(monkeypatch, available, device):
    monkeypatch.setattr("torch.cuda.is_available", lambda: available)
    assert resolve_device("auto") == device
    assert resolve_device("cpu") == "cpu"
