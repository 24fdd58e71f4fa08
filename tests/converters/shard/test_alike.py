"""Units of tensors that are alike, made once and renamed: the same as those that are made one by one."""

from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from builders import small_checkpoint
from quantized import DIALECTS, quantized_checkpoint

from converters.checkpoint.plan import Shard
from converters.conversion import Conversion
from converters.convert import ConvertOptions
from converters.layout import Layout, Stored
from converters.shard.alike import AlikeUnits, SliceOutputs
from converters.shard.mapping import ParallelMapping
from converters.shard.naming import ShardLayout
from converters.shard.plan import ShardOptions, plan_merge, plan_shard
from converters.shard.source import is_sharded, open_sharded
from converters.shard.units import SliceUnits
from converters.source import open_source
from tests.converters.shard.models import PLAIN, make, random_case, shard

Planned = tuple[tuple[Shard, ...], dict[str, Any]]


def planned(folder: Path, mapping: ParallelMapping | None, **convert: Any) -> Planned:
    with open_sharded(folder) if is_sharded(folder) else open_source(folder) as source:
        conversion: Conversion
        if mapping is None:
            conversion = plan_merge(source)  # type: ignore[arg-type]
        else:
            conversion = plan_shard(source, ShardOptions(mapping=mapping, convert=ConvertOptions(**convert)))
        return conversion.plan.shards, conversion.identity


def one_by_one(self: AlikeUnits, stored: Stored) -> list[SliceOutputs]:
    return self._made(stored)


@pytest.mark.parametrize("dialect", [PLAIN, "ct-fp8-channel", "ct-fp8-tensor", "ct-fp8-block", "ct-int4-packed-group"])
@pytest.mark.parametrize("layout", list(Layout))
def test_renamed_units_are_those_made_one_by_one(
    work: Path, monkeypatch: pytest.MonkeyPatch, dialect: str, layout: Layout
) -> None:
    """Cutting, cutting anew and merging, from all layouts; packed words state a shape that is read."""
    rng = Random(f"{dialect} {layout}")
    for number in range(2):
        case = random_case(rng, dialect, layout)
        src = make(work / str(number), case)
        folder = shard(src, work / f"{number}-cut", case.first, ShardLayout.RANK)
        jobs = [(src, case.first), (folder, case.second), (folder, None)]
        fast = [planned(*job) for job in jobs]
        with monkeypatch.context() as patch:
            patch.setattr(AlikeUnits, "of", one_by_one)
            assert fast == [planned(*job) for job in jobs]


def test_dtype_is_cast_in_renamed_units_too(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src, mapping = small_checkpoint(work / "src"), ParallelMapping(tp=2)
    fast = planned(src, mapping, dtype="float16")
    monkeypatch.setattr(AlikeUnits, "of", one_by_one)
    assert fast == planned(src, mapping, dtype="float16")


def test_experts_are_planned_once_a_kind(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Counter[str] = Counter()
    original = SliceUnits.units

    def units(self: SliceUnits, stored: Stored) -> Any:
        made[stored.name] += 1
        return original(self, stored)

    monkeypatch.setattr(SliceUnits, "units", units)
    src, _ = quantized_checkpoint(work / "src", DIALECTS["ct-fp8-channel"], moe_intermediate_size=32)
    planned(src, ParallelMapping(tp=2))
    experts = {name: count for name, count in made.items() if ".experts." in name}
    # gate, up and down of the first expert, once a rank
    assert sorted(experts.values()) == [2, 2, 2]
    folder = shard(src, work / "cut", ParallelMapping(tp=2), ShardLayout.RANK)
    made.clear()
    planned(folder, None)
    merged = Counter(name.rsplit(".", 2)[1] for name in made if ".experts." in name)
    # each down has the scale of its rows from both ranks, which are compared
    assert (merged["gate_proj"], merged["up_proj"]) == (1, 1)
    assert merged["down_proj"] > 1
