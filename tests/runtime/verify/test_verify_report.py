"""Limits to verdicts, and the words of a report."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from converters.compare import Outcome, StructureReport
from converters.findings import Finding, fail, warn
from glm4moe_cli._text import to_json
from runtime.verify.layer_checks import Divergence
from runtime.verify.limits import PROFILES, Limits, Overrides, choose_limits
from runtime.verify.report import Levels, Verdict, VerifyReport, build_report, worst
from runtime.verify.results import MtpDifference
from runtime.verify.summary import LogitSummary
from runtime.verify.tables import expert_rows, finding_rows, layer_rows, metric_rows
from tests.runtime.verify.reports import ROUTER, comparison, error, experts, layer, summary, table

FOLDERS = Path("source"), Path("candidate")
FP8 = PROFILES["fp8"]


def structure(*findings: Finding) -> StructureReport:
    outcomes = {Outcome.SAME: 30, Outcome.QUANTIZED: 70}
    return StructureReport("source", "candidate", findings, outcomes, "present", ())


def judged(limits: Limits = FP8, **changed: Any) -> VerifyReport:
    return build_report(FOLDERS, "fp8", Levels(layers=comparison(**changed)), limits)


def logits_only(found: LogitSummary | None, limits: Limits = FP8, **changed: Any) -> VerifyReport:
    return judged(limits, summary=found, layers=(), mtp=None, **changed)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ({}, Verdict.PASS),
        ({"kl": 0.01}, Verdict.PASS),
        ({"kl": 0.012}, Verdict.PASS),
        ({"kl": 0.0121}, Verdict.WARN),
        ({"kl": 0.0169}, Verdict.WARN),
        ({"kl": 0.0171}, Verdict.FAIL),
        ({"kl": math.nan}, Verdict.FAIL),
        ({"kl": math.inf}, Verdict.FAIL),
        ({"top1": 0.949}, Verdict.PASS),
        ({"top1": 0.947}, Verdict.WARN),
        ({"top1": 0.917}, Verdict.FAIL),
        ({"ratio": 1.0091}, Verdict.WARN),
        ({"ratio": 1.0141}, Verdict.FAIL),
        ({"ratio": 0.5}, Verdict.PASS),
        ({"kl": 0.03, "top1": 0.5}, Verdict.FAIL),
    ],
)
def test_verdict_is_the_worst_of_the_metrics_beyond_two_standard_errors(
    values: dict[str, float], verdict: Verdict
) -> None:
    """Standard errors are 0.001, that of the ratio 0.002."""
    assert logits_only(summary(**values)).verdict is verdict


def test_beyond_the_limit_by_less_than_two_errors_warns() -> None:
    """0.0152 is above 0.015, at which FP8 fails, but might be 0.0132."""
    report = logits_only(summary(kl=0.0152))
    assert report.verdict is Verdict.WARN
    assert report.reasons == ("KL mean 0.0152 +- 0.001 nats, expected <= 0.01 / 0.015",)


def test_worst_of_nothing_is_a_pass() -> None:
    assert worst([]) is Verdict.PASS
    assert worst([Verdict.WARN, Verdict.FAIL, Verdict.PASS]) is Verdict.FAIL


@pytest.mark.parametrize(
    ("kl", "flips", "relative", "verdict"),
    [(0.0, 0, 0.0, "pass"), (1e-9, 0, 0.0, "fail"), (0.0, 1, 0.0, "fail"), (0.0, 0, 1e-9, "fail")],
)
def test_identity_allows_no_difference_at_all(kl: float, flips: int, relative: float, verdict: str) -> None:
    equal = layer(0, attention=error(0.0), mlp=error(relative), experts=experts(0.0))
    found = summary(kl, 1.0, 1.0, flips)
    report = judged(PROFILES["identity"], summary=found, layers=(equal,), mtp=None)
    assert report.verdict == verdict


def test_override_is_held_against_the_value_itself() -> None:
    bar = choose_limits("fp8", Overrides(max_kl=0.0059))
    assert logits_only(summary(kl=0.006), bar).verdict is Verdict.FAIL
    assert logits_only(summary(kl=0.5), choose_limits("fp8", Overrides(max_kl=0.6))).verdict is Verdict.PASS


def test_layer_beyond_its_limit_fails_and_is_named_with_its_worst_token() -> None:
    layers = (layer(0), layer(1, mlp=error(0.09)), layer(2, attention=error(0.5)))
    report = judged(layers=layers, mtp=None)
    assert report.verdict is Verdict.FAIL
    assert report.reasons == (
        "layer 2 attention: relative error 0.5, 1 at token 17, expected <= 0.08",
        "layer 1 MoE: relative error 0.09, 0.18 at token 17, expected <= 0.08",
    )
    assert report.first_divergence == Divergence(1, "MoE", 0.09, 0.06)
    assert (report.first_off, report.wrong_layers) == (1, (1, 2))
    checks = {check.metric: check for check in report.checks}
    assert checks["attention error, worst layer"].found == "0.5 (layer 2 attention)"
    assert checks["MLP and MoE error, worst layer"].floor == 0.002


def test_error_of_the_floors_size_is_no_error() -> None:
    """0.2 is beyond FP8's limit, but noise alone gives 0.1: nothing can be said of this layer."""
    noisy = layer(1, attention=error(0.2, floor=0.1))
    assert judged(layers=(noisy,), mtp=None).verdict is Verdict.PASS
    assert judged(layers=(layer(1, attention=error(0.2, floor=None)),), mtp=None).verdict is Verdict.FAIL


def test_slope_says_what_the_error_hides() -> None:
    """A gain of 1.02 on a layer whose relative error is within the limit."""
    report = judged(layers=(layer(4, attention=error(0.04, slope=1.02)),), mtp=None)
    assert report.reasons == ("layer 4 attention: |slope - 1| 0.02 at slope 1.02, expected <= 0.015",)


def test_one_expert_fails_though_its_layer_does_not() -> None:
    report = judged(layers=(layer(6, experts=experts(0.03, 1.41, None)),), mtp=None)
    assert report.reasons == ("layer 6 expert 1: relative error 1.41 on 20 tokens, slope 1, expected <= 0.12",)
    assert (report.outlined, report.wrong_layers) == (((6, 1),), (6,))


def test_unexplained_routing_fails_and_explained_does_not() -> None:
    explained = replace(ROUTER, changed=0.1, worst_margin=0.004, worst_token=3)
    assert judged(layers=(layer(3, router=explained),), mtp=None).verdict is Verdict.PASS
    wrong = replace(explained, unexplained=31, worst_margin=0.2)
    report = judged(layers=(layer(3, router=wrong), layer(4, router=replace(wrong, unexplained=2))), mtp=None)
    assert report.reasons == (
        "layer 3 router: 31 tokens go to other experts at margins up to 0.2, expected none above 0.005",
        "layer 4 router: 2 tokens go to other experts at margins up to 0.2, expected none above 0.005",
    )
    (check,) = (check for check in report.checks if check.metric.startswith("router"))
    assert (check.value, check.place) == (33, "layer 3")


def test_norm_before_the_mlp_is_judged_beside_both_halves() -> None:
    """2^-9 is what rounding a gain to bf16 may do, 2^-8 twice that."""
    values = {2**-9: Verdict.PASS, 0.003: Verdict.WARN, 2**-8: Verdict.WARN, 0.004: Verdict.FAIL}
    for relative, verdict in values.items():
        assert judged(layers=(layer(4, mlp_norm=error(relative)),), mtp=None).verdict is verdict
    report = judged(layers=(layer(4, mlp=error(0.5), mlp_norm=error(0.1)),), mtp=None)
    assert "layer 4 norm before the MLP: relative error 0.1, 0.2 at token 17, expected <= 0.003906" in report.reasons
    assert report.first_divergence == Divergence(4, "norm before the MLP", 0.1, 2**-9)
    assert report.wrong_layers == (4,)
    assert "worst of 1 layer layer 4 MoE 0.5" in report.headline


def test_routing_weight_that_moves_is_judged_above_its_floor() -> None:
    moved = replace(ROUTER, weight_moved=0.005, weight_moved_floor=0.0005)
    report = judged(layers=(layer(0, router=None, experts=()), layer(3, router=moved)), mtp=None)
    assert report.reasons == ("layer 3 router: share of the routing weight moved 0.005, expected <= 0.004",)
    assert report.first_divergence == Divergence(3, "router", 0.005, 0.002)
    assert report.wrong_layers == (3,)
    noisy = replace(moved, weight_moved_floor=0.0026)
    assert judged(layers=(layer(3, router=noisy),), mtp=None).verdict is Verdict.PASS
    assert judged(layers=(layer(3, router=replace(moved, weight_moved=math.nan)),), mtp=None).verdict is Verdict.FAIL


@pytest.mark.parametrize("part", ["mlp_norm", "router"])
def test_identity_allows_neither_norm_nor_router_to_differ(part: str) -> None:
    different = error(1e-9) if part == "mlp_norm" else replace(ROUTER, weight_moved=1e-9)
    equal = layer(3, attention=error(0.0), mlp=error(0.0), experts=experts(0.0))
    alone = {"summary": None, "tokens": None, "mtp": None}
    assert judged(PROFILES["identity"], layers=(equal,), **alone).verdict is Verdict.PASS
    assert judged(PROFILES["identity"], layers=(replace(equal, **{part: different}),), **alone).verdict is Verdict.FAIL


def test_models_without_layers_say_where_nan_begins() -> None:
    report = logits_only(summary(), tokens=table(bad=(2,)), first_non_finite=("candidate: layer 4, expert 2, token 3",))
    assert report.reasons == (
        "candidate: layer 4, expert 2, token 3: NaN or Inf",
        "candidate: NaN or Inf logits 1 token (first at token 3, window 0), expected 0",
    )
    assert report.to_json()["run"]["first_non_finite"] == ("candidate: layer 4, expert 2, token 3",)


def test_one_of_a_kind_is_counted_as_one() -> None:
    levels = [Levels(structure(*(fail(f"tensor {i}", "a", "b") for i in range(count)))) for count in (1, 2)]
    assert [build_report(FOLDERS, "fp8", one).checks[0].found for one in levels] == ["1 finding", "2 findings"]
    wrong = replace(ROUTER, unexplained=1, worst_margin=0.2)
    (reason,) = judged(layers=(layer(3, router=wrong),), mtp=None).reasons
    assert reason.startswith("layer 3 router: 1 token goes to other experts at margins up to 0.2")


def test_free_running_routing_alone_never_fails() -> None:
    assert judged(layers=(layer(3, router_own=replace(ROUTER, unexplained=50)),)).verdict is Verdict.PASS


def test_nan_in_a_layer_is_named_where_it_begins() -> None:
    nan = error(math.nan, slope=math.nan)
    layers = (
        layer(0),
        layer(1, mlp=nan, first_non_finite="candidate: MLP output, token 9"),
        layer(2, attention=nan, first_non_finite="candidate: attention output, token 9"),
    )
    report = judged(layers=layers, mtp=None)
    assert report.reasons[0] == "layer 1: NaN or Inf: candidate: MLP output, token 9"
    assert report.wrong_layers == (1, 2)


def test_expert_far_above_its_siblings_warns() -> None:
    report = judged(layers=(layer(2, experts=experts(0.03, 0.031, 0.03, 0.029, 0.03, 0.07)),), mtp=None)
    assert report.verdict is Verdict.WARN
    assert report.reasons == ("layer 2 expert 5: relative error 0.07, 2.3 times its siblings'",)
    assert report.outlined == ((2, 5),)


def test_mtp_layer_is_judged_by_its_kl_and_its_acceptance() -> None:
    bad = judged(mtp=MtpDifference(summary(kl=0.5), 0.5, 0.1))
    assert [reason.split(" ")[:3] for reason in bad.reasons] == [["MTP:", "KL", "mean"], ["MTP:", "acceptance", "lost"]]
    # 400 positions at 50 % are known to 2.5 %: 5 % of loss may be chance
    assert judged(mtp=MtpDifference(summary(), 0.5, 0.44)).verdict is Verdict.PASS
    assert judged(mtp=MtpDifference(None, 0.5, 0.5)).verdict is Verdict.FAIL


def test_non_finite_logits_fail_with_their_first_position() -> None:
    report = logits_only(summary(), tokens=table(bad=(2, 3)))
    assert report.verdict is Verdict.FAIL
    assert report.reasons == ("candidate: NaN or Inf logits 2 tokens (first at token 3, window 0), expected 0",)


def test_nothing_finite_fails() -> None:
    report = logits_only(None)
    assert report.verdict is Verdict.FAIL
    assert report.reasons == ("KL mean nothing to measure, expected <= 0.01 / 0.015",)


def test_headline_of_a_pass_says_what_was_measured_and_what_was_not() -> None:
    report = build_report(FOLDERS, "fp8", Levels(structure=structure(), layers=comparison()), FP8)
    assert report.headline == (
        "PASS: fp8: 100 source tensors: 30 same, 70 quantized; MTP layer present; worst of 3 layers layer 0 attention "
        "0.03 (floor 0.002); 0.00% of expert sets changed on equal input; KL 0.006 +- 0.001 nats (floor 0.0002), "
        "top-1 97.00%, PPL ratio 1.00100 +- 0.002 over 400 tokens; MTP KL 0.006, acceptance 49.00% for 50.00%; "
        "not checked: bytes of the files, weights element by element, activations quantized at run time, generated "
        "text, serving engines"
    )


def test_below_three_floors_nothing_is_ranked() -> None:
    assert (
        "KL 0.0005 +- 0.001 nats (floor 0.0002: indistinguishable from rounding)"
        in logits_only(summary(kl=5e-4)).headline
    )


def test_headline_of_a_failure_begins_with_the_reason() -> None:
    assert logits_only(summary(kl=0.31)).headline.startswith(
        "FAIL: fp8: KL mean 0.31 +- 0.001 nats, expected <= 0.01 / 0.015; KL 0.31"
    )


def test_causes_stand_before_the_reasons() -> None:
    from converters.diagnosis.cause import Cause, CauseCode

    cause = Cause(CauseCode.EXCHANGED, "experts 0 and 1", "hold each other's values", "all bytes", "Convert again.")
    report = replace(logits_only(summary(kl=0.31)), causes=(cause,))
    assert report.headline.startswith("FAIL: fp8: experts 0 and 1: hold each other's values (all bytes); KL mean 0.31")
    many = replace(report, causes=(cause,) * 5).headline
    assert many.count("experts 0 and 1") == 3
    assert "; and 2 more causes; KL mean" in many


def test_many_reasons_are_counted_not_listed() -> None:
    report = build_report(FOLDERS, "fp8", Levels(structure(*(fail(f"tensor {i}", "a", "b") for i in range(9)))))
    assert "tensor 2: expected a, found b; and 6 more; 100 source tensors" in report.headline


def test_failures_come_before_warnings_of_an_earlier_level() -> None:
    found = comparison(summary=summary(kl=0.31), layers=(), mtp=None)
    report = build_report(FOLDERS, "fp8", Levels(structure(warn("LICENSE", "one", "none")), layers=found), FP8)
    assert report.verdict is Verdict.FAIL
    assert [reason.split()[0] for reason in report.reasons] == ["KL", "LICENSE:"]


def test_structure_alone_does_not_claim_models() -> None:
    report = build_report(FOLDERS, "fp8", Levels(structure()))
    assert report.verdict is Verdict.PASS
    assert report.not_checked == (
        "bytes of the files",
        "weights element by element",
        "layers and routers",
        "logits",
        "outputs of the MTP layer",
        "generated text",
        "serving engines",
    )


def test_nothing_found_and_nothing_to_say_leaves_no_loose_punctuation() -> None:
    report = build_report(FOLDERS, "identity", Levels())
    assert report.headline.startswith("PASS: identity: not checked: structure, bytes of the files, ")


def test_metric_rows_carry_interval_floor_threshold_and_verdict() -> None:
    rows = {row[0]: row for row in metric_rows(judged(summary=summary(kl=0.0125)))}
    assert rows["KL mean"] == (
        "KL mean",
        "",
        "",
        "0.0125 +- 0.001 (naive 0.0005) nats",
        "0.0105 to 0.0145",
        "0.0002",
        "<= 0.01 / 0.015",
        "warn",
    )
    assert rows["perplexity ratio"][:4] == ("perplexity ratio", "5", "5.005", "1.001 +- 0.002")
    assert rows["perplexity ratio"][6:] == ("<= 1.005 / 1.01", "pass")
    assert rows["KL p99"] == ("KL p99", "", "", "0.05 nats", "", "", "", "")
    assert "KL p99.9" not in rows
    assert rows["KL below zero"][3] == "1 of 400 tokens"
    assert rows["top-10 overlap"][3] == "0.94 +- 0.001 (naive 0.0005)"
    assert rows["unexplained top-1 changes"][3] == "3 of 400 tokens"
    assert rows["probability change of the right token, p1 / p99"][3] == "-0.05 / 0.04"
    assert rows["KL where the reference's largest p is in [0.95, 1]"][3] == "0.001 nats, 400 tokens"
    assert rows["expert error, worst expert"][3] == "0.031 (layer 1 expert 1)"


def test_checks_without_a_summary_row_are_shown_too() -> None:
    found = comparison(summary=None, tokens=table(bad=(0, 1, 2, 3)), layers=(), mtp=None)
    report = build_report(FOLDERS, "fp8", Levels(structure(), layers=found), FP8)
    assert [(row[0], row[-1]) for row in metric_rows(report)] == [
        ("structure", "pass"),
        ("candidate: NaN or Inf logits", "fail"),
        ("KL mean", "fail"),
    ]


def test_rows_of_findings_layers_and_experts() -> None:
    report = build_report(FOLDERS, "fp8", Levels(structure(warn("LICENSE", "one", "none"))))
    assert finding_rows(report) == [("warn", "LICENSE", "one", "none")]
    dense, moe, mtp = layer_rows(comparison().layers)
    assert dense == ("layer 0", "0.03 (0.002)", "", "0.03 (0.002)", "1", "30.5", "0.05 (0.002)", "", "", "", "")
    assert moe[-4:] == ("0.00%", "0", "0", "0.00%")
    told = layer(1, mlp_norm=error(0.004), router=replace(ROUTER, weight_moved=0.02, weight_moved_floor=0.001))
    (row,) = layer_rows((told,))
    assert (row[2], row[9]) == ("0.004", "0.02 (0.001)")
    assert mtp[0] == "MTP layer 2"
    assert expert_rows(comparison().layers)[0] == ("layer 1 expert 1", "0.031", "1", "20", "21")


def test_json_has_verdict_headline_and_every_part() -> None:
    document = json.loads(json.dumps(to_json(judged(layers=(layer(1, mlp=error(0.09)),)).to_json()), allow_nan=False))
    assert document["verdict"] == "fail"
    assert document["headline"].startswith("FAIL: fp8: layer 1 MoE: relative error 0.09")
    assert document["first_divergence"] == {"layer": 1, "part": "MoE", "relative": 0.09, "limit": 0.06}
    assert document["layers"][0]["mlp"]["worst_token"] == 17
    assert document["logits"]["summary"]["num_tokens"] == 400
    assert document["run"]["protocol"] == "first 5 of 5 tokens"
    assert set(document) == {
        "source",
        "candidate",
        "scheme",
        "verdict",
        "headline",
        "causes",
        "reasons",
        "checks",
        "limits",
        "outliers",
        "first_divergence",
        "structure",
        "bytes",
        "weights",
        "layers",
        "ends",
        "logits",
        "mtp",
        "floor",
        "run",
        "routing",
        "text",
        "runtime",
        "not_checked",
        "provenance",
    }


def test_json_of_levels_that_run_no_model_has_no_models() -> None:
    document = build_report(FOLDERS, "fp8", Levels(structure())).to_json()
    assert [document[name] for name in ("layers", "logits", "mtp", "floor", "run")] == [None] * 5


@pytest.mark.parametrize("name", ["fp8 per channel", "int8 per group, packed", "nvfp4", "int4 per group, packed"])
@pytest.mark.parametrize("quantizes_inputs", [True, False])
def test_every_kind_of_quantization_has_limits(name: str, quantizes_inputs: bool) -> None:
    report = replace(structure(), schemes=(name,), quantizes_inputs=quantizes_inputs)
    assert report.scheme in PROFILES
    assert report.scheme.startswith(name.split()[0])


def test_of_several_formats_the_coarsest_counts() -> None:
    report = replace(structure(), schemes=("nvfp4", "fp8 per channel", "int8 per channel"))
    assert report.scheme == "nvfp4"
