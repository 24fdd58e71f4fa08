"""Kernels on a real GPU: the grid of the interpreter, blocks through pinned memory, and whole results."""

import threading
from pathlib import Path

import pytest
import torch

from converters.accelerator import Proved
from converters.job import run
from converters.pipeline import RunOptions
from converters.quantize import plan_quantize
from converters.source import open_source
from tests.runtime.kernels.grid import as_bytes, cases, hard_rows, not_refused, within

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", list(cases()))
def test_kernel_makes_the_bytes_of_its_twin(name: str) -> None:
    assert cases()[name].differences("cuda") == []


def test_no_weight_that_is_not_finite_passes() -> None:
    assert not_refused("cuda") == []


def test_errors_are_added_up_in_the_twin_s_order() -> None:
    from tests.runtime.kernels import sums

    assert sums.differences("cuda") == 0


# one case for each transform
@pytest.mark.parametrize("name", list({case.transform.name: name for name, case in cases().items()}.values()))
def test_threads_do_not_disturb_each_other(name: str) -> None:
    from runtime.kernels.accelerator import CudaAccelerator

    accelerator, case, wrong = Proved(CudaAccelerator()), cases()[name], []

    def work(seed: int) -> None:
        for size in (3, 64, 7):
            weight_RC = within(hard_rows(256).roll(seed, 0).repeat(size, 1), torch.bfloat16)
            beside = case.beside(weight_RC)
            made = accelerator.apply(case.transform, weight_RC, *beside)
            expected = case.transform(weight_RC, *beside)
            if made is None or not all(
                torch.equal(as_bytes(ours), as_bytes(theirs)) for ours, theirs in zip(made, expected, strict=True)
            ):
                wrong.append((seed, size))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("fp8", {}),
        ("fp8", {"arithmetic": "compressed-tensors"}),
        ("fp8-block", {"format": "deepseek"}),
        ("int8", {}),
        ("int8-weight-only", {"group_size": "32"}),
        ("nvfp4-weight-only", {"search": "mse"}),
        ("nvfp4-weight-only", {"format": "modelopt"}),
    ],
)
def test_result_does_not_depend_on_the_device(tmp_path: Path, scheme: str, options: dict[str, str]) -> None:
    from quantizing import checkpoint, options_for

    from runtime.kernels.accelerator import open_accelerator

    src = checkpoint(tmp_path / "src")
    for device in ("cpu", "cuda"):
        with open_source(src) as source:
            plan = plan_quantize(source, options_for(src, scheme, **options))
            run(plan, tmp_path / device, RunOptions(3, accelerator=open_accelerator(device)), lambda _: None)
    files = sorted(path.name for path in (tmp_path / "cpu").iterdir() if path.is_file())
    assert files == sorted(path.name for path in (tmp_path / "cuda").iterdir() if path.is_file())
    assert [
        name for name in files if (tmp_path / "cpu" / name).read_bytes() != (tmp_path / "cuda" / name).read_bytes()
    ] == []
