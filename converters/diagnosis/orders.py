"""Hypotheses about order: rotary dims within heads, q, k and v, gate and up, shifted rows, slices and halves.

Each is a row (or column) order of the source; which of them holds is for the test of the bytes to say.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from typing import TYPE_CHECKING

from converters.diagnosis.cause import CauseCode
from converters.diagnosis.explained import Explained
from converters.diagnosis.gather import columns_in_order, in_order, stacked_rows
from converters.diagnosis.hypothesis import Hypothesis, candidate_rows, is_proved, own_rows
from converters.quant.judge import Pair
from converters.schema import TABLE, Role, Tensor
from converters.source import Source

if TYPE_CHECKING:
    import torch

_ROTATED = (Role.ATTENTION, Role.ATTENTION_BIAS, Role.QK_NORM)
_VOCABULARY = (Role.EMBEDDING, Role.HEAD, Role.MTP_EMBEDDING, Role.MTP_HEAD)
_QKV, _GATE_UP = 3, 2
_MOST_SHIFTED = 8
_SLICES = (2, 4, 8, 16, 32, 64)
_LEAST_SLICE = 4
Guess = tuple[Explained, Hypothesis]


def order_guesses(source: Source, pair: Pair, pairs: Mapping[str, Pair]) -> Iterator[Guess]:
    """Yield every order that a tensor's rows or columns may have come in.

    Args:
        source: where the rows came from.
        pair: the tensor.
        pairs: all tensors by name, for orders that concern those that engines fuse with it.
    """
    yield from _rope_orders(source, pair)
    yield from _fused_orders(source, pair, pairs)
    yield from _shifts(pair)
    yield from _slices(pair)


def members(source: Source, tensor: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors that engines fuse with one, from top to bottom; it alone if there are none."""
    if tensor.spec.fuse is None:
        return (tensor,)
    specs = {
        spec.fuse.position: spec
        for spec in TABLE
        if spec.fuse and (spec.role, spec.fuse.group) == (tensor.spec.role, tensor.spec.fuse.group)
    }
    names = (specs[place].name.format(layer=tensor.layer, expert=tensor.expert) for place in sorted(specs))
    return tuple(source.schema.tensors[name] for name in names)


def _rope_orders(source: Source, pair: Pair) -> Iterator[Guess]:
    """Yield the orders of rotary dims within heads, for weights, biases and norms of q and k."""
    import torch

    spec, config = pair.tensor.spec, source.config
    is_q_or_k = spec.fuse is not None and spec.fuse.position < _QKV - 1
    if spec.role not in _ROTATED or not (is_q_or_k or spec.role is Role.QK_NORM):
        return
    head, heads = config.head_dim, pair.tensor.shape[0] // config.head_dim
    for dims in dict.fromkeys((config.rotary_dim, head)):
        halves = torch.arange(dims).view(2, -1)
        rest, extent = (
            torch.arange(dims, head),
            "" if dims == config.rotary_dim else f", over all {head} of a head",
        )
        interleaved = halves.T.reshape(-1)
        orders = (
            (interleaved, f"its rotary dims lie in pairs (interleaved), where this model has halves{extent}"),
            (
                interleaved.argsort(),
                f"its rotary dims, halves already, were taken for pairs and put into halves{extent}",
            ),
        )
        for order, words in orders:
            within = torch.cat((order, rest))
            index = (torch.arange(heads)[:, None] * head + within).view(-1)
            shown = " ".join(map(str, within[:6].tolist()))
            told = f"all {len(index)} rows agree when rows of each head are taken in the order {shown} ..."
            yield _guess(pair, CauseCode.ROPE_ORDER, words, told), Hypothesis(in_order(own_rows(pair), index))
    if config.rotary_dim < head:
        index = (torch.arange(heads)[:, None] * head + torch.arange(head).roll(-config.rotary_dim)).view(-1)
        words = f"its rotary dims lie behind the {head - config.rotary_dim} others of a head, where they come first"
        told = f"all {len(index)} rows agree when each head is turned by {config.rotary_dim}"
        yield _guess(pair, CauseCode.ROPE_ORDER, words, told), Hypothesis(in_order(own_rows(pair), index))


def _fused_orders(source: Source, pair: Pair, pairs: Mapping[str, Pair]) -> Iterator[Guess]:
    """Yield what a fused tensor comes to that was taken apart in another order than it was put together.

    Several orders may explain one member; only those that explain the first rows of all of them are meant.
    """
    group = members(source, pair.tensor)
    if len(group) == 1 or any(tensor.name not in pairs for tensor in group):
        return
    rows, sizes = stacked_rows(source, group), [tensor.shape[0] for tensor in group]
    for code, words, index in _group_orders(source, group):
        found = {
            tensor.name: Hypothesis(in_order(rows, own)) for tensor, own in zip(group, index.split(sizes), strict=True)
        }
        if all(is_proved(pairs[name], hypothesis, sampled=True) for name, hypothesis in found.items()):
            told = f"all {pair.tensor.shape[0]} rows agree with that order of {' + '.join(map(str, sizes))} rows"
            yield _guess(pair, code, words, told), found[pair.tensor.name]


def _group_orders(source: Source, group: Sequence[Tensor]) -> Iterator[tuple[CauseCode, str, "torch.Tensor"]]:
    import torch

    total = sum(tensor.shape[0] for tensor in group)
    ranges, top = [], 0
    for tensor in group:
        ranges.append(torch.arange(top, top + tensor.shape[0]))
        top += tensor.shape[0]
    if len(group) == _GATE_UP:
        pairs = torch.arange(total).view(2, -1).T.reshape(-1)
        code = CauseCode.GATE_UP_INTERLEAVED
        yield code, "gate and up rows lie in turns", pairs
        yield code, "gate and up rows were taken for rows in turns and put apart, which they were", pairs.argsort()
        return
    for order in permutations(range(_QKV)):
        if order != (0, 1, 2):
            words = f"rows of the fused tensor lie in the order {', '.join('qkv'[place] for place in order)}"
            yield CauseCode.QKV_ORDER, words, torch.cat([ranges[place] for place in order])
    groups = source.config.num_key_value_heads
    by_group = torch.cat([part.view(groups, -1) for part in ranges], dim=1).view(-1)
    words = f"rows lie by key-value head, its query heads first, {groups} times q, k, v"
    yield CauseCode.QKV_ORDER, words, by_group
    words = "rows were taken for q, k, v by key-value head and put apart, which they were"
    yield CauseCode.QKV_ORDER, words, by_group.argsort()


def _shifts(pair: Pair) -> Iterator[Guess]:
    """Yield shifts by a few rows; what stands in rows that have nothing to come from is not looked at."""
    import torch

    rows = pair.tensor.shape[0]
    if len(pair.tensor.shape) < 2 or rows <= 2 * _MOST_SHIFTED:
        return
    for shift in (sign * by for by in range(1, _MOST_SHIFTED + 1) for sign in (1, -1)):
        span = (shift, rows) if shift > 0 else (0, rows + shift)
        index = (torch.arange(rows) - shift) % rows
        where = "down" if shift > 0 else "up"
        words = f"its rows are shifted {where} by {abs(shift)}"
        told = f"rows {span[0]} to {span[1] - 1} are rows {span[0] - shift} to {span[1] - shift - 1} of the source"
        hypothesis = Hypothesis(in_order(own_rows(pair), index), span=span)
        yield _guess(pair, CauseCode.ROWS_SHIFTED, words, told), hypothesis


def _slices(pair: Pair) -> Iterator[Guess]:
    """Yield orders of equal slices of rows or of columns, as their first rows show them."""
    for dim, extent in enumerate(pair.tensor.shape):
        for count in _SLICES:
            if extent % count or extent // count < _LEAST_SLICE:
                continue
            order = _slice_order(pair, dim, count)
            if order is None or order == list(range(count)):
                continue
            yield _slice_guess(pair, dim, order)
            break


def _slice_guess(pair: Pair, dim: int, order: list[int]) -> Guess:
    import torch

    count, extent = len(order), pair.tensor.shape[dim]
    index = torch.arange(extent).view(count, -1)[order].view(-1)
    kind = ("rows", "columns")[dim]
    is_projection = pair.tensor.spec.role is Role.MTP_PROJECTION
    code = CauseCode.HALVES_EXCHANGED if is_projection and count == _GATE_UP else CauseCode.TP_SLICES_PERMUTED
    if count == _GATE_UP:
        what = "embedding and hidden state, side by side, " if code is CauseCode.HALVES_EXCHANGED and dim else ""
        words = f"{what}both halves of its {kind} are exchanged"
    else:
        words = f"its {count} slices of {extent // count} {kind} come in the order {' '.join(map(str, order))}"
    told = f"all {extent} {kind} agree in that order"
    rows = own_rows(pair)
    return _guess(pair, code, words, told), Hypothesis((in_order, columns_in_order)[dim](rows, index))


def _slice_order(pair: Pair, dim: int, count: int) -> list[int] | None:
    """Return of each slice which one of the source its first rows resemble most; None if they are no permutation."""
    import torch

    found, source = candidate_rows(pair), own_rows(pair)
    width = pair.tensor.shape[dim] // count
    if dim == 1:
        sample = min(8, pair.tensor.shape[0])
        ours, theirs = (rows(0, sample).float().view(sample, count, width) for rows in (found, source))
        ours, theirs = ours.transpose(0, 1).reshape(count, -1), theirs.transpose(0, 1).reshape(count, -1)
    else:
        sample = min(4, width)
        ours, theirs = (
            torch.stack([rows(i * width, i * width + sample).float().reshape(-1) for i in range(count)])
            for rows in (found, source)
        )
    distance = torch.cdist(ours, theirs)
    order: list[int] = distance.argmin(dim=1).tolist()
    return order if sorted(order) == list(range(count)) else None


def _guess(pair: Pair, code: CauseCode, statement: str, evidence: str) -> Explained:
    return Explained(pair.tensor, code, statement, evidence)


def first_proved(pair: Pair, guesses: Iterator[Guess]) -> Explained | None:
    """Return the first guess that the bytes prove."""
    return next((explained for explained, hypothesis in guesses if is_proved(pair, hypothesis)), None)
