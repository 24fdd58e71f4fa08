"""What a serving engine says of the tokens, against what this runtime says of them with the same checkpoint.

Shape suffixes: S scored tokens, V vocabulary, N tokens whose probability the engine told.

p is this runtime's distribution, in fp32; q the engine's, of which the N most likely tokens are known.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from converters.config import Glm4MoeConfig
from converters.errors import InputError
from converters.shard.whole import open_whole
from runtime.config import EngineConfig
from runtime.model.loader import ModelLoader
from runtime.streaming.plan import LOGIT_ROWS
from runtime.verify.engine_answers import ENGINE_OPTION, PromptScores, choices, prompt_scores, read_answers
from runtime.verify.engine_client import EngineServer, ServerOptions, is_url
from runtime.verify.head import load_head
from runtime.verify.store_layout import Runner, RunOptions, row_starts
from runtime.verify.summary import Estimate, estimate_mean
from runtime.verify.tokens import EncodedText

# a log-probability near -4 has a grid of 0.031 in bf16: beyond four steps of it a flip is no tie any more
NEAR_TIE_NATS = 0.125
# what is left of the engine's probabilities is at least this: their sum is only known to rounding
_LEAST_REST = 1e-7
# a sum of probabilities above this is not rounding of fp32
_MAX_SUM = 1.001
RANKS = (1, 2, 5, 20)


@dataclass(frozen=True, slots=True)
class EngineComparison:
    """An engine against this runtime, on the same tokens.

    Attributes:
        where: the server, or the file of its answers.
        protocol: windows and stride in words.
        dtype: of this runtime's compute.
        num_tokens: tokens whose log-probability both sides have.
        num_with_top: those for which the engine told its most likely tokens too.
        nll_difference: mean of d = NLL_engine - NLL_ours, nats.
        nll_difference_rms: root of the mean of d^2.
        nll_difference_max: the largest |d|.
        worst_token: where that is, an index in the text.
        perplexity: exp(mean NLL) of this runtime.
        perplexity_engine: of the engine.
        kl_bound: mean over tokens of a lower bound of KL(ours||engine): that between the told tokens one by one and
            all others as one; None without such tokens. Merging tokens never raises a KL.
        kl_bound_max: the largest of a single token.
        top1: share of tokens whose most likely token is the same, ties of the engine resolved in favour.
        near_ties: tokens whose most likely one differs, but is behind ours by at most NEAR_TIE_NATS for this runtime.
        unexplained: tokens where it is further behind.
        worst_gap: the largest of these distances in nats, 0 where all agree.
        rank_shares: share of tokens where the engine's most likely token has at most this rank for us, by RANKS.
        notes: what was left out.
    """

    where: str
    protocol: str
    dtype: str
    num_tokens: int
    num_with_top: int
    nll_difference: Estimate
    nll_difference_rms: float
    nll_difference_max: float
    worst_token: int
    perplexity: float
    perplexity_engine: float
    kl_bound: float | None
    kl_bound_max: float | None
    top1: float | None
    near_ties: int
    unexplained: int
    worst_gap: float
    rank_shares: dict[int, float]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenMatch:
    """One scored token: its loss on both sides and, where the engine told its most likely tokens, how they compare."""

    nll: float
    nll_engine: float
    kl_bound: float | None = None
    gap: float | None = None
    rank: int | None = None


def compare_engine(
    where: str,
    candidate: Path,
    text: EncodedText,
    options: RunOptions,
    runner: Runner,
    *,
    server: ServerOptions | None = None,
    seed: int = 0,
) -> EngineComparison:
    """Compare an engine's log-probabilities of a text with this runtime's.

    Args:
        where: URL of an OpenAI-compatible server, or a file of its answers: one JSON object a line, in the order of
            the windows; an answer with several choices counts as several.
        candidate: the checkpoint that the engine serves.
        text: tokens and windows; each window is one prompt.
        options: how this runtime runs the checkpoint.
        runner: what runs it.
        server: how to ask a server.
        seed: of the bootstrap.
    Raises:
        NetworkError: the server does not answer. InputError: its answers are of other tokens, or tell nothing of them.
    """
    vocab_size = Glm4MoeConfig.from_folder(candidate).vocab_size
    told = engine_scores(where, text, vocab_size, server or ServerOptions())
    run = runner(candidate, text, options, behind=matching_bytes(vocab_size))
    # not before: none is held while layers are
    with open_whole(candidate) as source:
        engine = EngineConfig(dtype=options.dtype, device=options.device)
        head = load_head(ModelLoader(source, engine, with_mtp=False))
    matches, places, of_window, starts = list[TokenMatch](), list[int](), list[int](), row_starts(text.plan)
    with torch.inference_mode():
        for window, scores in zip(text.plan.windows, told, strict=True):
            hidden_SD = run.final_hidden_RD[starts[window.index] : starts[window.index + 1]][window.logit_rows]
            token = window.first_scored
            for rows in hidden_SD.split(LOGIT_ROWS):
                log_p_SV = head.forward_fp32(rows.to(head.weight.device)).log_softmax(-1).double().cpu()
                for log_p_V in log_p_SV:
                    place = token - window.begin
                    matches.append(match_token(log_p_V, text.token_ids[token], scores, place))
                    places.append(token)
                    of_window.append(window.index)
                    token += 1
    return summarize_matches(where, text, options.dtype, matches, (places, of_window), seed=seed)


def matching_bytes(vocab_size: int) -> int:
    """Return the most bytes that `compare_engine` holds beside the head and a block of logits: two blocks in fp64."""
    return 2 * LOGIT_ROWS * vocab_size * torch.float64.itemsize


def engine_scores(where: str, text: EncodedText, vocab_size: int, options: ServerOptions) -> list[PromptScores]:
    """Return what the engine says of each window."""
    prompts = [text.token_ids[window.begin : window.end] for window in text.plan.windows]
    found: list[PromptScores] = []
    answers = EngineServer(where, options).answers(prompts) if is_url(where) else read_answers(_file(where))
    for number, answer in enumerate(answers, 1):
        subject = f"{ENGINE_OPTION} {where}, answer {number}"
        for choice in choices(answer, subject):
            if len(found) == len(prompts):
                raise _wrong_count(where, len(prompts), "more")
            found.append(prompt_scores(choice, prompts[len(found)], vocab_size, subject))
    if len(found) < len(prompts):
        raise _wrong_count(where, len(prompts), str(len(found)))
    return found


def match_token(log_p_V: torch.Tensor, token: int, scores: PromptScores, place: int) -> TokenMatch:
    """Compare one prediction.

    Args:
        log_p_V: this runtime's log-probabilities (V,) fp64 of the token at `place`.
        token: the token that stands there.
        scores: the engine's, of the whole window.
        place: index in the window.
    """
    logprob, top = scores.logprobs[place], scores.top[place]
    assert logprob is not None, place
    nll, nll_engine = -log_p_V[token].item(), -logprob
    if not top or len(top) < 2:
        return TokenMatch(nll, nll_engine)
    ids = list(top)
    log_p_N, log_q_N = log_p_V[ids], torch.tensor([top[name] for name in ids], dtype=torch.float64)
    best = log_q_N == log_q_N.max()
    chosen = log_p_N[best].max()
    gap, rank = (log_p_V.max() - chosen).item(), int((log_p_V > chosen).sum()) + 1
    return TokenMatch(nll, nll_engine, kl_lower_bound(log_p_N, log_q_N), gap, rank)


def kl_lower_bound(log_p_N: torch.Tensor, log_q_N: torch.Tensor) -> float | None:
    """Return sum over N of p (ln p - ln q), plus the same of what is left of both, in nats; None for impossible q.

    A lower bound of the KL over the whole vocabulary, since merging outcomes never raises it.

    Args:
        log_p_N: this runtime's log-probabilities of the tokens that the engine told, fp64.
        log_q_N: the engine's.
    """
    p_N, q_N = log_p_N.exp(), log_q_N.exp()
    if q_N.sum().item() > _MAX_SUM:
        return None
    rest_p, rest_q = max(1 - p_N.sum().item(), 0.0), max(1 - q_N.sum().item(), _LEAST_REST)
    told = torch.where(p_N > 0, p_N * (log_p_N - log_q_N), 0.0).sum().item()
    return told + (rest_p * math.log(rest_p / rest_q) if rest_p > 0 else 0.0)


def summarize_matches(
    where: str,
    text: EncodedText,
    dtype: str,
    matches: Sequence[TokenMatch],
    at: tuple[Sequence[int], Sequence[int]],
    *,
    seed: int,
) -> EngineComparison:
    """Reduce matches to figures; `at` has each one's index in the text, and its window."""
    nll, nll_engine = (torch.tensor([getattr(m, n) for m in matches]).double() for n in ("nll", "nll_engine"))
    difference = nll_engine - nll
    worst = int(difference.abs().nan_to_num(torch.inf).argmax())
    gaps = [match.gap for match in matches if match.gap is not None]
    ranks = [match.rank for match in matches if match.rank is not None]
    bounds = [match.kl_bound for match in matches if match.kl_bound is not None]
    return EngineComparison(
        where=where,
        protocol=text.plan.protocol,
        dtype=dtype,
        num_tokens=len(matches),
        num_with_top=len(gaps),
        nll_difference=estimate_mean(difference, torch.tensor(at[1]), seed=seed),
        nll_difference_rms=math.sqrt(difference.square().mean().item()),
        nll_difference_max=difference.abs()[worst].item(),
        worst_token=at[0][worst],
        perplexity=_exp(nll),
        perplexity_engine=_exp(nll_engine),
        kl_bound=sum(bounds) / len(bounds) if bounds else None,
        kl_bound_max=max(bounds, default=None),
        top1=sum(gap == 0 for gap in gaps) / len(gaps) if gaps else None,
        near_ties=sum(0 < gap <= NEAR_TIE_NATS for gap in gaps),
        unexplained=sum(not gap <= NEAR_TIE_NATS for gap in gaps),
        worst_gap=max(gaps, default=0.0),
        rank_shares={rank: sum(found <= rank for found in ranks) / len(ranks) for rank in RANKS} if ranks else {},
        notes=tuple(_notes(len(matches), len(gaps), len(bounds))),
    )


def _notes(num_tokens: int, num_with_top: int, num_bounds: int) -> Iterator[str]:
    if num_with_top < num_tokens:
        left = num_tokens - num_with_top
        yield f"engine: {left} of {num_tokens} tokens came without the most likely ones; only their loss was compared"
    if num_bounds < num_with_top:
        yield f"engine: probabilities of {num_with_top - num_bounds} tokens sum to more than 1; no KL for these"


def _exp(nll_S: torch.Tensor) -> float:
    return nll_S.mean().exp().item()


def _file(where: str) -> Path:
    path = Path(where)
    if not path.is_file():
        raise InputError(
            f"{ENGINE_OPTION} {where}",
            expected="a file of a server's answers, or a URL such as http://localhost:8000/v1",
            found="neither",
        )
    return path


def _wrong_count(where: str, expected: int, found: str) -> InputError:
    return InputError(
        f"{ENGINE_OPTION} {where}",
        expected=f"answers to {expected} prompts, one for each window",
        found=found,
        next_step="Ask with the same text, --context-length, --stride, --num-tokens and --seed.",
    )
