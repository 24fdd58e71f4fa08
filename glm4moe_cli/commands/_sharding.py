"""What the commands that cut a checkpoint for ranks have in common: show what each rank gets, and what does not fit."""

from collections import Counter
from collections.abc import Sequence

from converters.conversion import Conversion
from converters.shard.limits import Limit, MappingRefused
from converters.shard.mapping import ParallelMapping
from converters.shard.plan import ShardOptions, plan_shard
from converters.source import Source
from glm4moe_cli._output import Output
from glm4moe_cli._text import format_bytes


def planned(output: Output, source: Source, options: ShardOptions, command: str) -> Conversion:
    """Return the planned shards and show what each rank gets; if sizes do not fit, show those that do.

    Raises:
        MappingRefused: a size does not fit.
    """
    try:
        conversion = plan_shard(source, options, command)
    except MappingRefused as refusal:
        show_limits(output, refusal.limits)
        raise
    sizes: Counter[int] = Counter()
    for shard in conversion.plan.shards:
        assert shard.rank is not None, shard.file
        sizes[shard.rank] += shard.file_bytes
    distribution = conversion.plan.distribution
    assert distribution is not None
    mapping = ParallelMapping.from_json(distribution.as_json()["mapping"])
    show_ranks(output, mapping, sizes)
    return conversion


def show_ranks(output: Output, mapping: ParallelMapping, sizes: Counter[int]) -> None:
    """Print where each rank stands and the bytes of its files."""
    rows = []
    for rank in mapping.ranks():
        first = sum(mapping.stages[: rank.stage])
        layers = f"{first} to {first + mapping.stages[rank.stage] - 1}"
        rows.append(
            (rank.index, rank.stage, layers, rank.tp, rank.moe_tp, rank.moe_ep, format_bytes(sizes[rank.index]))
        )
    output.table("Ranks", ("rank", "stage", "layers", "tp", "moe tp", "moe ep", "bytes"), rows)


def show_limits(output: Output, limits: Sequence[Limit]) -> None:
    """Print every part that is cut, with the sizes that divide it and the way round where this one does not."""
    rows = [
        (
            limit.part,
            limit.width,
            limit.unit if limit.unit > 1 else "",
            limit.option,
            limit.reason or "fits",
            " ".join(map(str, limit.sizes)) or "none",
            limit.way_round if limit.reason else "",
        )
        for limit in limits
    ]
    columns = ("part", "size", "in groups of", "asked for", "result", "sizes that fit", "way round")
    output.table("Sizes that fit", columns, rows)
