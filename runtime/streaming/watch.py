"""Who looks at what passes: nothing is done here, those who measure take what they need."""

from collections.abc import Mapping

import torch

from runtime.moe.router import Routing

Values = Mapping[str, torch.Tensor]


class Watcher:
    """Told of every layer, a block of rows at a time; values are by the name of the lane, (R, D) each.

    Rows are indices (R,) int64 among the rows of the run. A lane that ends before these rows is left out.
    """

    def begin(self, layer: int, *, is_mtp: bool) -> None:
        """A layer begins."""

    def inputs(self, rows_R: torch.Tensor, inputs: Values) -> None:
        """What the free lanes are given."""

    def attention(self, rows_R: torch.Tensor, outputs: Values) -> None:
        """Attention's outputs before the residual sum."""

    def normed(self, rows_R: torch.Tensor, outputs: Values) -> None:
        """What each side's norm in front of the MLP makes of its leader's state."""

    def routers(self, rows_R: torch.Tensor, routings: Mapping[str, Routing], biases: Values) -> None:
        """What the routers decide, and their correction biases (E,); forced lanes decide on their leader's input."""

    def expert(self, expert: int, rows_R: torch.Tensor, outputs: Values) -> None:
        """An expert's unweighted outputs for rows that a free lane sends it, of that lane and those it leads."""

    def mlp(self, rows_R: torch.Tensor, outputs: Values) -> None:
        """The MLP's outputs before the residual sum."""

    def states(self, rows_R: torch.Tensor, states: Values) -> None:
        """Hidden states of the free lanes behind the layer."""

    def final(self, rows_R: torch.Tensor, outputs: Values) -> None:
        """What the norm behind the last layer, or within the MTP layer, makes of the states; of forced lanes as well.

        Those are given their leader's state; one with noise is left out.
        """

    def end(self) -> None:
        """The layer is done."""
