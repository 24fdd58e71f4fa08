"""Running sums that turn outputs and decisions of one layer into its errors, a block of rows at a time.

All sums are fp64. A row with a NaN or Inf on either side is left out of them and counted in `num_skipped`: one such
token would hide what the others say, and where it first appears is told apart.

Shape suffixes: R rows (tokens of the block), D hidden, E experts, K experts per token.
"""

import math
from dataclasses import dataclass, field

import torch

from runtime.moe.router import Routing
from runtime.verify.results import ExpertDifference, OutputError, RouterDifference

# without a floor run: on a 12-layer model bf16 rounding alone changed no expert set of a larger margin
DEFAULT_MARGIN_LIMIT = 2e-3
# changes of a score beyond this many times the 99th percentile of the floor's are not rounding
MARGIN_FACTOR = 4.0
# fp64 scratch of one block stays near 16 MB per buffer at any hidden size
_BLOCK_ELEMENTS = 1 << 21


@dataclass(slots=True)
class OutputErrorSum:
    """Sums over tokens of |u|^2, |u_hat|^2, <u, u_hat> and |u_hat - u|^2, and the worst token so far.

    Attributes:
        num_tokens: tokens added, those left out included.
        num_skipped: tokens left out, because u or u_hat has a NaN or Inf there.
    """

    num_tokens: int = 0
    num_skipped: int = 0
    _reference: float = 0.0
    _candidate: float = 0.0
    _product: float = 0.0
    _error: float = 0.0
    _worst: float = -1.0
    _worst_token: int | None = None
    _first_skipped: int | None = None

    def add(self, u_RD: torch.Tensor, u_hat_RD: torch.Tensor, token_indices_R: torch.Tensor) -> None:
        """Add R tokens: outputs (R, D) of both sides in any float dtype, and each token's index in the text."""
        assert u_RD.shape == u_hat_RD.shape, (u_RD.shape, u_hat_RD.shape)
        assert token_indices_R.shape == u_RD.shape[:1], (token_indices_R.shape, u_RD.shape)
        rows = max(1, _BLOCK_ELEMENTS // u_RD.shape[1])
        for block in zip(u_RD.split(rows), u_hat_RD.split(rows), token_indices_R.split(rows), strict=True):
            if block[2].numel():
                self._add_block(*block)

    def _add_block(self, u_RD: torch.Tensor, u_hat_RD: torch.Tensor, token_indices_R: torch.Tensor) -> None:
        self.num_tokens += u_RD.shape[0]
        u_RD, u_hat_RD = u_RD.double(), u_hat_RD.double()
        reference_R, candidate_R = u_RD.square().sum(-1), u_hat_RD.square().sum(-1)
        # squares of finite fp32 values do not overflow fp64, so a row's sum is finite where its elements are
        finite_R = (reference_R + candidate_R).isfinite()
        product_R, error_R = (u_RD * u_hat_RD).sum(-1), (u_hat_RD - u_RD).square().sum(-1)
        if not bool(finite_R.all()):
            bad_R = token_indices_R.to(finite_R.device)[~finite_R]
            self.num_skipped += bad_R.numel()
            self._first_skipped = int(bad_R[0]) if self._first_skipped is None else self._first_skipped
            sums = reference_R, candidate_R, product_R, error_R
            reference_R, candidate_R, product_R, error_R = (values_R[finite_R] for values_R in sums)
            token_indices_R = token_indices_R.to(finite_R.device)[finite_R]
            if not token_indices_R.numel():
                return
        relative_R = _ratio(error_R, reference_R)
        row = int(relative_R.argmax())
        if (worst := math.sqrt(relative_R[row].item())) > self._worst:
            self._worst, self._worst_token = worst, int(token_indices_R[row])
        totals = torch.stack([values.sum() for values in (reference_R, candidate_R, product_R, error_R)]).tolist()
        self._reference += totals[0]
        self._candidate += totals[1]
        self._product += totals[2]
        self._error += totals[3]

    @property
    def relative(self) -> float:
        """|u_hat - u| / |u|: 0 where both are zero, infinite where only u is, NaN without a finite token."""
        return _root_ratio(self._error, self._reference) if self.num_tokens > self.num_skipped else math.nan

    @property
    def slope(self) -> float:
        """<u, u_hat> / <u, u>: the gain of u_hat over u; 1 where u is zero, NaN without a finite token."""
        if self.num_tokens == self.num_skipped:
            return math.nan
        return self._product / self._reference if self._reference else 1.0

    @property
    def cosine(self) -> float:
        """<u, u_hat> / (|u| |u_hat|): 1 where both are zero, 0 where one of them is, NaN without a finite token."""
        if self.num_tokens == self.num_skipped:
            return math.nan
        norms = math.sqrt(self._reference) * math.sqrt(self._candidate)
        return self._product / norms if norms else float(self._reference == self._candidate)

    @property
    def sqnr_db(self) -> float:
        """10 log10(|u|^2 / |u_hat - u|^2) = -20 log10(relative), decibels; infinite where nothing differs."""
        relative = self.relative
        if math.isnan(relative) or math.isinf(relative):
            return -relative
        return -20 * math.log10(relative) if relative else math.inf

    def result(self, floor: float | None = None) -> OutputError:
        """Return the errors of all tokens added.

        Without a finite token every figure is NaN, and the worst token is the first that was left out.

        Args:
            floor: `relative` of the floor run.
        """
        worst_token = self._first_skipped if self._worst_token is None else self._worst_token
        return OutputError(
            relative=self.relative,
            worst_token_relative=self._worst if self._worst_token is not None else math.nan,
            worst_token=worst_token or 0,
            cosine=self.cosine,
            sqnr_db=self.sqnr_db,
            slope=self.slope,
            floor_relative=floor,
        )


def _ratio(error_R: torch.Tensor, reference_R: torch.Tensor) -> torch.Tensor:
    """Return error / reference (R,), with 0 / 0 = 0."""
    return torch.where(error_R == 0, 0.0, error_R / reference_R)


def _root_ratio(error: float, reference: float) -> float:
    if not error:
        return 0.0
    return math.sqrt(error / reference) if reference else math.inf


@dataclass(slots=True)
class ScoreChange:
    """|change of a score sigmoid(logit) + bias| of the reference's router between its own input and a noisy one."""

    _changes: list[torch.Tensor] = field(default_factory=list)

    def add(self, logits_RE: torch.Tensor, noisy_logits_RE: torch.Tensor) -> None:
        """Add router logits (R, E) fp32 of both inputs; the bias is the same in both and falls out."""
        change_RE = (noisy_logits_RE.double().sigmoid() - logits_RE.double().sigmoid()).abs()
        self._changes.append(change_RE[change_RE.isfinite()].float().cpu())

    def margin_limit(self) -> float:
        """Return MARGIN_FACTOR * the 99th percentile (nearest rank) over tokens and experts; the default of none."""
        changes_N = torch.cat(self._changes) if self._changes else torch.empty(0)
        if not changes_N.numel():
            return DEFAULT_MARGIN_LIMIT
        rank = max(1, math.ceil(0.99 * changes_N.numel()))
        return MARGIN_FACTOR * changes_N.kthvalue(rank).values.item()


@dataclass(slots=True)
class RouterSum:
    """Sums over tokens of what two routers decided; 16 bytes are kept of each token whose expert set differs.

    Attributes:
        num_tokens: tokens added, those left out included.
        num_skipped: tokens left out, because a logit of either side is NaN or Inf.
    """

    num_tokens: int = 0
    num_skipped: int = 0
    _overlap: float = 0.0
    _moved: float = 0.0
    _logit_max_abs: float = 0.0
    _margins: list[torch.Tensor] = field(default_factory=list)
    _tokens: list[torch.Tensor] = field(default_factory=list)
    _loads_2E: torch.Tensor | None = None

    def add(
        self, reference: Routing, candidate: Routing, reference_bias_E: torch.Tensor, token_indices_R: torch.Tensor
    ) -> None:
        """Add the decisions for R tokens.

        Args:
            reference: of R tokens.
            candidate: of the same tokens, on the same device.
            reference_bias_E: the reference's correction bias (E,).
            token_indices_R: each token's index in the text.
        """
        self.num_tokens += token_indices_R.numel()
        finite_R = (reference.router_logits_TE + candidate.router_logits_TE).isfinite().all(-1)
        self.num_skipped += int((~finite_R).sum())
        if not bool(finite_R.any()):
            return
        ours, theirs = _select(reference, finite_R), _select(candidate, finite_R)
        ours_RE, theirs_RE = _weights_by_expert(ours), _weights_by_expert(theirs)
        kept_RE, chosen_RE = _chosen(ours), _chosen(theirs)
        shared_R = (kept_RE & chosen_RE).sum(-1)
        changed_R = shared_R < ours.topk_ids_TK.shape[1]
        self._overlap += shared_R.double().sum().item() / ours.topk_ids_TK.shape[1]
        self._moved += ((theirs_RE - ours_RE).abs().sum(-1) / (2 * ours_RE.sum(-1))).sum().item()
        difference_RE = theirs.router_logits_TE.double() - ours.router_logits_TE.double()
        self._logit_max_abs = max(self._logit_max_abs, difference_RE.abs().max().item())
        loads_2E = torch.stack([kept_RE.sum(0), chosen_RE.sum(0)]).cpu()
        self._loads_2E = loads_2E if self._loads_2E is None else self._loads_2E + loads_2E
        if bool(changed_R.any()):
            margin_R = margins(ours.router_logits_TE, reference_bias_E, ours.topk_ids_TK)
            self._margins.append(margin_R[changed_R].cpu())
            self._tokens.append(token_indices_R.to(finite_R.device)[finite_R][changed_R].cpu())

    @property
    def weight_moved(self) -> float:
        """Mean share of a token's routing weight that is elsewhere; NaN where no token could be counted."""
        count = self.num_tokens - self.num_skipped
        return self._moved / count if count else math.nan

    def result(self, margin_limit: float | None = None, floor: float | None = None) -> RouterDifference:
        """Return the difference over all tokens added; shares are NaN where no token could be counted.

        Args:
            margin_limit: a change of the expert set at a larger margin is unexplained; by default DEFAULT_MARGIN_LIMIT.
            floor: `weight_moved` of the floor run.
        """
        limit = DEFAULT_MARGIN_LIMIT if margin_limit is None else margin_limit
        margins_N = torch.cat(self._margins) if self._margins else torch.empty(0, dtype=torch.float64)
        count, num_changed = self.num_tokens - self.num_skipped, margins_N.numel()
        worst = int(margins_N.argmax()) if num_changed else None
        return RouterDifference(
            changed=num_changed / count if count else math.nan,
            overlap=self._overlap / count if count else math.nan,
            unexplained=int((margins_N > limit).sum()),
            margin_limit=limit,
            worst_margin=0.0 if worst is None else margins_N[worst].item(),
            worst_token=None if worst is None else int(torch.cat(self._tokens)[worst]),
            weight_moved=self.weight_moved,
            load_shift=math.nan if self._loads_2E is None else total_variation(self._loads_2E),
            logit_max_abs=self._logit_max_abs,
            weight_moved_floor=floor,
        )


def margins(logits_RE: torch.Tensor, bias_E: torch.Tensor, ids_RK: torch.Tensor) -> torch.Tensor:
    """Return (R,) fp64: the least score sigmoid(logit) + bias of a chosen expert less the largest of the others.

    With one group of experts, as all GLM-4.5 to 4.7 have, that is the k-th less the (k+1)-th score. Infinite where all
    experts are chosen, negative where a group limit shut a better expert out.
    """
    scores_RE = logits_RE.double().sigmoid() + bias_E.double().to(logits_RE.device)
    least_R = scores_RE.gather(1, ids_RK).amin(-1)
    return least_R - scores_RE.scatter(1, ids_RK, -math.inf).amax(-1)


def total_variation(loads_2E: torch.Tensor) -> float:
    """Return half the sum over experts of |share of one row - share of the other|, 0 to 1, from counts (2, E)."""
    shares_2E = loads_2E.double() / loads_2E.double().sum(-1, keepdim=True)
    return (shares_2E[0] - shares_2E[1]).abs().sum().item() / 2


def _select(routing: Routing, rows_R: torch.Tensor) -> Routing:
    values = routing.router_logits_TE, routing.topk_ids_TK, routing.topk_weights_TK
    return routing if bool(rows_R.all()) else Routing(routing.layer, *(value[rows_R] for value in values))


def _weights_by_expert(routing: Routing) -> torch.Tensor:
    """Return the routing weights (R, E) fp64 by expert, 0 where it is not chosen."""
    zeros_RE = torch.zeros_like(routing.router_logits_TE, dtype=torch.float64)
    return zeros_RE.scatter(1, routing.topk_ids_TK, routing.topk_weights_TK.double())


def _chosen(routing: Routing) -> torch.Tensor:
    """Return (R, E) bool: which experts are chosen."""
    none_RE = torch.zeros_like(routing.router_logits_TE, dtype=torch.bool)
    return none_RE.scatter(1, routing.topk_ids_TK, True)


class ExpertSum:
    """Errors of the routed experts of one layer, each on the tokens that the reference sends it."""

    def __init__(self, num_experts: int) -> None:
        self._sums = [OutputErrorSum() for _ in range(num_experts)]
        self._loads_E = torch.zeros(num_experts, dtype=torch.int64)

    def add(self, expert: int, u_RD: torch.Tensor, u_hat_RD: torch.Tensor, token_indices_R: torch.Tensor) -> None:
        """Add an expert's unweighted outputs (R, D) for R tokens that the reference sends it."""
        self._sums[expert].add(u_RD, u_hat_RD, token_indices_R)

    def add_candidate(self, topk_ids_RK: torch.Tensor) -> None:
        """Count where the free-running candidate sends R tokens: ids (R, K)."""
        self._loads_E += torch.bincount(topk_ids_RK.flatten().cpu(), minlength=self._loads_E.numel())

    def result(self) -> tuple[ExpertDifference, ...]:
        """Return one difference an expert, by index; its errors are NaN where all its tokens had to be left out."""
        return tuple(
            ExpertDifference(
                expert=expert,
                num_tokens=sums.num_tokens,
                num_tokens_candidate=int(self._loads_E[expert]),
                relative=sums.relative if sums.num_tokens else None,
                slope=sums.slope if sums.num_tokens else None,
            )
            for expert, sums in enumerate(self._sums)
        )
