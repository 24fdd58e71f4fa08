"""Where NaN and Inf first appear as the lanes of a comparison pass through the layers.

Shapes: R rows, D hidden.
"""

from collections.abc import Mapping

import torch

from runtime.moe.router import Routing
from runtime.streaming.rows import RowPlan
from runtime.streaming.watch import Values, Watcher


class FiniteWatch(Watcher):
    """Looks at everything that lanes yield, and notes the first place of each layer and of the run that is not finite.

    Args:
        plan: which token is in which row.
        words: what a reader calls each lane that is looked at, by its name.
    Attributes:
        of_layer: by lane, its first place in the layer at hand.
        of_run: by lane, its first place and the layer.
    """

    def __init__(self, plan: RowPlan, words: Mapping[str, str]) -> None:
        self._plan, self._words = plan, words
        self._name = ""
        self.of_layer: dict[str, str] = {}
        self.of_run: dict[str, str] = {}

    def begin(self, layer: int, *, is_mtp: bool) -> None:
        """Look at another layer."""
        self._name = f"MTP layer {layer}" if is_mtp else f"layer {layer}"
        self.of_layer = {}

    def inputs(self, rows_R: torch.Tensor, inputs: Values) -> None:
        """Look at what comes in."""
        self._look("input", rows_R, inputs)

    def attention(self, rows_R: torch.Tensor, outputs: Values) -> None:
        """Look at attention."""
        self._look("attention output", rows_R, outputs)

    def normed(self, rows_R: torch.Tensor, outputs: Values) -> None:
        """Look at what the MLP is given."""
        self._look("input of the MLP", rows_R, outputs)

    def routers(self, rows_R: torch.Tensor, routings: Mapping[str, Routing], biases: Values) -> None:
        """Look at the logits of routers."""
        self._look("router logits", rows_R, {name: routing.router_logits_TE for name, routing in routings.items()})

    def expert(self, expert: int, rows_R: torch.Tensor, outputs: Values) -> None:
        """Look at an expert."""
        self._look(f"expert {expert}", rows_R, outputs)

    def mlp(self, rows_R: torch.Tensor, outputs: Values) -> None:
        """Look at the MLP."""
        self._look("MLP output", rows_R, outputs)

    def states(self, rows_R: torch.Tensor, states: Values) -> None:
        """Look at what leaves the layer."""
        self._look("hidden state", rows_R, states)

    def tokens(self, rows_R: torch.Tensor) -> torch.Tensor:
        """Return the index in the text (R,) of each row's token."""
        return self._plan.positions[rows_R]

    def _look(self, where: str, rows_R: torch.Tensor, values: Values) -> None:
        for lane in [lane for lane in self._words if lane in values and lane not in self.of_layer]:
            finite_R = values[lane].isfinite().all(-1).cpu()
            if not bool(finite_R.all()):
                place = f"{where}, token {int(self.tokens(rows_R)[~finite_R][0])}"
                self.of_layer[lane] = f"{self._words[lane]}: {place}"
                self.of_run.setdefault(lane, f"{self._words[lane]}: {self._name}, {place}")
