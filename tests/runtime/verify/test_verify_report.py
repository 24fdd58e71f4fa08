"""Limits to verdicts, and the words of a report."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from converters.compare import Outcome, StructureReport
from converters.findings import Finding, fail, warn
from runtime.verify.compare import LogitsComparison, NonFinite
from runtime.verify.limits import PROFILES, Bound, Overrides, choose_limits
from runtime.verify.report import Levels, Verdict, VerifyReport, build_report, worst
from runtime.verify.routing import LayerRouting
from runtime.verify.summary import Estimate, KlSummary, LogitSummary, PerplexitySummary
from runtime.verify.tables import finding_rows, metric_rows, routing_rows

FOLDERS = Path("source"), Path("candidate")
FP8 = PROFILES["fp8"]


def estimate(mean: float) -> Estimate:
    return Estimate(mean, 0.001, 0.0005)


def summary(kl: float = 0.006, top1: float = 0.97, ratio: float = 1.001) -> LogitSummary:
    return LogitSummary(
        num_tokens=400,
        num_windows=4,
        kl_nats=KlSummary(estimate(kl), 0.004, 0.01, 0.02, 0.05, None, 0.2, 1),
        perplexity=PerplexitySummary(5.0, 5.0 * ratio, estimate(math.log(ratio)), ratio, 0.002),
        top1=estimate(top1),
        top5_overlap=estimate(0.95),
        top1_in_top5=estimate(0.999),
        delta_p=estimate(-0.001),
        delta_p_rms=0.02,
        logit_max_abs=1.5,
        logit_rms=0.1,
    )


def comparison(found: LogitSummary | None, *non_finite: NonFinite) -> LogitsComparison:
    routing = (LayerRouting(3, 400, 0.975, 0.1),)
    return LogitsComparison("first 400 of 400 tokens", "float32", "cpu", 400, found, routing, non_finite)


def structure(*findings: Finding) -> StructureReport:
    outcomes = {Outcome.SAME: 30, Outcome.QUANTIZED: 70}
    return StructureReport("source", "candidate", findings, outcomes, "present", ())


def judged(found: LogitSummary | None, *non_finite: NonFinite) -> VerifyReport:
    return build_report(FOLDERS, "fp8", Levels(logits=comparison(found, *non_finite)), FP8)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ({}, Verdict.PASS),
        ({"kl": 0.01}, Verdict.PASS),
        ({"kl": 0.0101}, Verdict.WARN),
        ({"kl": 0.0151}, Verdict.FAIL),
        ({"kl": math.nan}, Verdict.FAIL),
        ({"kl": math.inf}, Verdict.FAIL),
        ({"top1": 0.95}, Verdict.PASS),
        ({"top1": 0.949}, Verdict.WARN),
        ({"top1": 0.919}, Verdict.FAIL),
        ({"ratio": 1.0051}, Verdict.WARN),
        ({"ratio": 1.0101}, Verdict.FAIL),
        ({"ratio": 0.5}, Verdict.PASS),
        ({"kl": 0.03, "top1": 0.5}, Verdict.FAIL),
    ],
)
def test_verdict_is_the_worst_of_the_metrics(values: dict[str, float], verdict: Verdict) -> None:
    assert judged(summary(**values)).verdict is verdict


def test_worst_of_nothing_is_a_pass() -> None:
    assert worst([]) is Verdict.PASS
    assert worst([Verdict.WARN, Verdict.FAIL, Verdict.PASS]) is Verdict.FAIL


def test_identity_allows_no_difference_at_all() -> None:
    limits = PROFILES["identity"]
    same = build_report(FOLDERS, "identity", Levels(logits=comparison(summary(0.0, 1.0, 1.0))), limits)
    other = build_report(FOLDERS, "identity", Levels(logits=comparison(summary(1e-9, 1.0, 1.0))), limits)
    assert (same.verdict, other.verdict) == (Verdict.PASS, Verdict.FAIL)


def test_override_replaces_both_bounds_of_its_metric_only() -> None:
    limits = choose_limits("fp8", Overrides(max_kl=0.5, min_top1=0.0))
    assert limits == replace(FP8, max_kl=Bound(0.5, 0.5), min_top1=Bound(0.0, 0.0))
    assert choose_limits("fp8", Overrides()) == FP8


def test_non_finite_logits_fail_with_their_first_position() -> None:
    report = judged(summary(), NonFinite("candidate", 3, 41, 1))
    assert report.verdict is Verdict.FAIL
    assert report.reasons == ("candidate: NaN or Inf logits 3 tokens, first at token 41, window 1, expected 0",)


def test_nothing_finite_fails() -> None:
    report = judged(None, NonFinite("reference", 400, 1, 0))
    assert report.verdict is Verdict.FAIL
    assert "KL mean nothing to measure, expected <= 0.01 / 0.015" in report.reasons


def test_headline_of_a_pass_says_what_was_measured_and_what_was_not() -> None:
    report = build_report(FOLDERS, "fp8", Levels(structure=structure(), logits=comparison(summary())), FP8)
    assert report.headline == (
        "PASS: fp8: 100 source tensors: 30 same, 70 quantized; MTP layer present; KL 0.006 +- 0.001 nats, "
        "top-1 97.00%, PPL ratio 1.00100 +- 0.002 over 400 tokens; not checked: bytes of the files, "
        "weights element by element, activations quantized at run time, outputs of the MTP layer, generated text"
    )


def test_headline_of_a_failure_begins_with_the_reason() -> None:
    assert judged(summary(kl=0.31)).headline.startswith(
        "FAIL: fp8: KL mean 0.31 +- 0.001 nats, expected <= 0.01 / 0.015; KL 0.31"
    )


def test_many_reasons_are_counted_not_listed() -> None:
    report = build_report(FOLDERS, "fp8", Levels(structure(*(fail(f"tensor {i}", "a", "b") for i in range(9)))))
    assert "tensor 2: expected a, found b; and 6 more; 100 source tensors" in report.headline


def test_failures_come_before_warnings_of_an_earlier_level() -> None:
    report = build_report(
        FOLDERS,
        "fp8",
        Levels(structure(warn("LICENSE", "one", "none")), logits=comparison(summary(kl=0.31))),
        FP8,
    )
    assert report.verdict is Verdict.FAIL
    assert [reason.split()[0] for reason in report.reasons] == ["KL", "LICENSE:"]


def test_structure_alone_does_not_claim_logits() -> None:
    report = build_report(FOLDERS, "fp8", Levels(structure()))
    assert report.verdict is Verdict.PASS
    assert report.not_checked == (
        "bytes of the files",
        "weights element by element",
        "logits",
        "outputs of the MTP layer",
        "generated text",
    )


def test_metric_rows_carry_threshold_and_verdict_where_there_is_one() -> None:
    rows = {row[0]: row for row in metric_rows(judged(summary(kl=0.012)))}
    assert rows["KL mean"] == ("KL mean", "", "", "0.012 +- 0.001 (naive 0.0005) nats", "<= 0.01 / 0.015", "warn")
    assert rows["perplexity ratio"] == (
        "perplexity ratio",
        "5",
        "5.005",
        "1.001 +- 0.002",
        "<= 1.005 / 1.01",
        "pass",
    )
    assert rows["KL p99"] == ("KL p99", "", "", "0.05 nats", "", "")
    assert "KL p99.9" not in rows
    assert rows["KL below zero"][3] == "1 of 400 tokens"


def test_checks_without_a_summary_row_are_shown_too() -> None:
    report = build_report(
        FOLDERS, "fp8", Levels(structure(), logits=comparison(None, NonFinite("candidate", 400, 1, 0))), FP8
    )
    assert [(row[0], row[-1]) for row in metric_rows(report)] == [
        ("structure", "pass"),
        ("candidate: NaN or Inf logits", "fail"),
        ("KL mean", "fail"),
    ]


def test_routing_and_finding_rows() -> None:
    report = build_report(FOLDERS, "fp8", Levels(structure(warn("LICENSE", "one", "none"))))
    assert finding_rows(report) == [("warn", "LICENSE", "one", "none")]
    assert routing_rows(comparison(summary()).routing) == [("3", "400", "97.50%", "10.00%")]


def test_json_has_verdict_headline_and_every_part() -> None:
    document = judged(summary()).to_json()
    assert document["verdict"] == "pass"
    assert document["headline"].startswith("PASS: fp8: KL 0.006")
    assert set(document) == {
        "source",
        "candidate",
        "scheme",
        "verdict",
        "headline",
        "reasons",
        "checks",
        "limits",
        "structure",
        "bytes",
        "weights",
        "logits",
        "not_checked",
    }


@pytest.mark.parametrize("name", ["fp8 per channel", "int8 per group, packed", "nvfp4", "int4 per group, packed"])
@pytest.mark.parametrize("quantizes_inputs", [True, False])
def test_every_kind_of_quantization_has_limits(name: str, quantizes_inputs: bool) -> None:
    report = replace(structure(), schemes=(name,), quantizes_inputs=quantizes_inputs)
    assert report.scheme in PROFILES
    assert report.scheme.startswith(name.split()[0])


def test_of_several_formats_the_coarsest_counts() -> None:
    report = replace(structure(), schemes=("nvfp4", "fp8 per channel", "int8 per channel"))
    assert report.scheme == "nvfp4"
