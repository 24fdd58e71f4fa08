"""Cut the layers into pipeline stages so that the largest stage has as few bytes as possible."""

from collections.abc import Sequence
from itertools import accumulate


def balance_stages(layers: Sequence[int], first: int, last: int, stages: int) -> tuple[int, ...]:
    """Return how many layers each stage gets: the least largest stage, and among those the least sum of squares.

    Args:
        layers: bytes of each layer, in order; at least one a stage.
        first: bytes that the first stage has besides, the embedding.
        last: bytes that the last stage has besides: norm, head, MTP layer.
        stages: how many.
    """
    count = len(layers)
    assert 1 <= stages <= count, (stages, count)
    ends = [0, *accumulate(layers)]

    def size(begin: int, end: int, stage: int) -> int:
        return ends[end] - ends[begin] + (first if stage == 0 else 0) + (last if stage == stages - 1 else 0)

    # best[end]: (largest stage, sum of squares, layers of each stage) of the stages so far
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for stage in range(stages):
        found: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        final = stage == stages - 1
        for end in (count,) if final else range(stage + 1, count - (stages - stage - 1) + 1):
            options = []
            for begin, (largest, squares, taken) in best.items():
                if begin < end:
                    own = size(begin, end, stage)
                    options.append((max(largest, own), squares + own * own, (*taken, end - begin)))
            found[end] = min(options)
        best = found
    return best[count][2]
