"""The sections on generated text and on a serving engine."""

from typing import TYPE_CHECKING, Any

from runtime.verify.report_html.tables import Table, plain_table
from runtime.verify.report_html.words import figure, grouped, percent, visible_token, with_error

if TYPE_CHECKING:
    from runtime.verify.engine_logprobs import EngineComparison
    from runtime.verify.text_answers import Answer
    from runtime.verify.text_results import TextReport, TextResult

# characters of an answer that are shown
_MOST_CHARACTERS = 600


def text_section(text: "TextReport") -> dict[str, Any]:
    """Return what the template shows of the answers: each prompt, both answers, and where they part."""
    return {
        "protocol": text.protocol,
        "problems": [(problem.severity, f"{problem.prompt}: {problem.statement}") for problem in text.problems],
        "results": [
            {
                "prompt": result.prompt,
                "place": _place(result),
                "answers": [_answer("reference", result.reference), _answer("candidate", result.candidate)],
            }
            for result in text.results
        ],
    }


def _place(result: "TextResult") -> str:
    if result.first_difference is None:
        return "equal answers"
    gap = "not among the reference's likely tokens"
    if result.gap is not None:
        gap = f"{figure(result.gap)} nats less likely for the reference"
    return f"first difference at token {result.first_difference}, {gap}"


def _answer(name: str, answer: "Answer") -> dict[str, str]:
    facts = [f"{grouped(len(answer.token_ids))} tokens", f"ended by {answer.finish_reason}"]
    facts += ["runs in circles"] if answer.is_loop else []
    facts += [f"calls {call}" for call in answer.tool_calls]
    cut = "\u2026" if len(answer.text) > _MOST_CHARACTERS else ""
    return {"name": name, "facts": ", ".join(facts), "text": visible_token(answer.text[:_MOST_CHARACTERS]) + cut}


def engine_table(engine: "EngineComparison") -> Table:
    """Return every figure of the comparison with an engine."""
    change = engine.nll_difference
    rows = [
        ("engine", engine.where),
        ("protocol", f"{engine.protocol}; this runtime in {engine.dtype}"),
        ("tokens", f"{grouped(engine.num_tokens)}, {grouped(engine.num_with_top)} of them with likely tokens"),
        ("NLL, engine less ours, mean", f"{with_error(change.mean, change.se)} nats"),
        ("NLL, engine less ours, RMS", f"{figure(engine.nll_difference_rms)} nats"),
        ("NLL, largest difference", f"{figure(engine.nll_difference_max)} nats at token {engine.worst_token}"),
        ("perplexity, ours and the engine's", f"{figure(engine.perplexity, 5)}, {figure(engine.perplexity_engine, 5)}"),
        ("KL, lower bound, mean", f"{figure(engine.kl_bound)} nats"),
        ("KL, lower bound, largest", f"{figure(engine.kl_bound_max)} nats"),
        ("same first choice", percent(engine.top1)),
        ("another first choice, near tie", grouped(engine.near_ties)),
        ("another first choice, unexplained", f"{grouped(engine.unexplained)}, up to {figure(engine.worst_gap)} nats"),
        *(
            (f"the engine's first choice is among our first {rank}", percent(share))
            for rank, share in engine.rank_shares.items()
        ),
        *(("note", note) for note in engine.notes),
    ]
    return plain_table("Serving engine", ("figure", "value"), rows)
