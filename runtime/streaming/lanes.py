"""What passes through the layers: a model's own hidden states, or another's that it is only asked about.

Shapes: T rows of a lane, R rows at a time, D hidden.
"""

from dataclasses import dataclass

import torch

from runtime.streaming.replay import Replay
from runtime.streaming.routed import Routed
from runtime.streaming.sides import Side

# what rounding to bf16 may do: half a unit in the last of its 8 places
NOISE = 2.0**-9


class Noise:
    """Multiplies by 1 + 2^-9 or 1 - 2^-9, at random, so that the relative error is 2^-9 exactly.

    Args:
        seed: of the signs.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, values_RD: torch.Tensor) -> torch.Tensor:
        """Return values (R, D) with noise, in their dtype."""
        signs = torch.randint(0, 2, values_RD.shape, generator=self._generator, dtype=torch.int8)
        factors = 1.0 + NOISE * (2.0 * signs - 1.0)
        return (values_RD.float() * factors.to(values_RD.device)).to(values_RD.dtype)


@dataclass(slots=True, kw_only=True)
class Lane:
    """Rows on their way through the layers of one side.

    A lane without leader is free: what comes out of a layer is what it gives to the next. A lane with a leader is
    forced: it gets its leader's input and its leader's routing in every layer, and keeps nothing.

    Attributes:
        name: for those who watch.
        side: whose weights.
        num_rows: the leading rows of the run.
        input_TD: what goes into the next layer, fp32.
        state_TD: what stands between attention and MLP, and then what comes out; a free lane's input_TD but for the
            MTP layer, a forced one's is its leader's or, with noise, its own.
        added_TD: sums of the experts' results, fp32.
        leader: see above.
        noise: on what a forced lane is given, or behind each layer of a free one.
        routed: decisions that hold for this lane in the layer at hand.
        replay: a free lane's values as they were kept. Nothing is computed for such a lane: its side is that of those
            it leads, whose layers it goes through.
    """

    name: str
    side: Side
    num_rows: int
    input_TD: torch.Tensor
    state_TD: torch.Tensor
    added_TD: torch.Tensor
    leader: "Lane | None" = None
    noise: Noise | None = None
    routed: Routed | None = None
    replay: Replay | None = None

    @property
    def is_free(self) -> bool:
        """Whether it keeps its own hidden states."""
        return self.leader is None

    @property
    def owner(self) -> "Lane":
        """The lane whose input this one has."""
        return self if self.leader is None else self.leader

    @property
    def shares_state(self) -> bool:
        """Whether its MLP is given exactly what its leader's is."""
        return self.leader is not None and self.noise is None
