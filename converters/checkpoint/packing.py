"""Which units stand in which file: in their order, up to a size."""

from collections.abc import Sequence

from converters.checkpoint.plan import Shard, Unit

DEFAULT_MAX_SHARD_BYTES = 5_000_000_000


def pack_shards(units: Sequence[Unit], max_shard_bytes: int, files: str = "model") -> tuple[Shard, ...]:
    """Distribute units over shards in order; a unit larger than the limit has a shard of its own."""
    groups: list[list[Unit]] = [[]]
    size = 0
    for unit in units:
        if groups[-1] and size + unit.nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(unit)
        size += unit.nbytes
    count = len(groups)
    if count == 1:
        return (Shard(f"{files}.safetensors", tuple(groups[0])),)
    return tuple(
        Shard(f"{files}-{number:05d}-of-{count:05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    )
