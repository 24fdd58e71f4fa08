"""Two small models that differ, and a text of random tokens."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import random_tensors, small_config, write_checkpoint

from converters.config import Glm4MoeConfig
from converters.schema import expand
from runtime.streaming.rows import RowPlan
from runtime.verify.tokens import EncodedText
from runtime.verify.windows import plan_windows

Edit = Callable[[dict[str, torch.Tensor]], None]


def random_text(num_tokens: int, *, context_length: int = 24, stride: int | None = None, seed: int = 4) -> EncodedText:
    """Return random tokens of the small model's vocabulary in windows."""
    ids = torch.randint(64, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    return EncodedText(tuple(ids), plan_windows(num_tokens, context_length=context_length, stride=stride))


def row_plan(text: EncodedText) -> RowPlan:
    """Return the rows of a text."""
    return RowPlan(text.token_ids, text.plan.windows)


@pytest.fixture
def make_small(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a small checkpoint under a name, its tensors edited; keywords change the config."""

    def make(name: str, edit: Edit | None = None, *, mtp: bool = True, **changes: object) -> Path:
        config = small_config(**changes, **({} if mtp else {"num_nextn_predict_layers": 0}))
        tensors = random_tensors(expand(Glm4MoeConfig.from_hf(config), mtp=mtp))
        if edit is not None:
            edit(tensors)
        return write_checkpoint(tmp_path / name, tensors, config)

    return make
