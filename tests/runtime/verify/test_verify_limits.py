"""Limits: what a floor moves, what the user's own bars replace, and who stands out among siblings."""

import math
from dataclasses import fields, replace
from itertools import pairwise

import pytest

from converters.quant.certificate import Certificate, Relation, TensorFigures
from runtime.verify.check import Verdict, judge
from runtime.verify.limits import PROFILES, Bound, Limits, Overrides, choose_limits
from runtime.verify.siblings import Outlier, layer_outliers, outliers, tensor_outliers
from tests.runtime.verify.reports import error, experts, layer

FP8 = PROFILES["fp8"]


def test_a_bound_widens_to_multiples_of_the_floor_and_never_narrows() -> None:
    bound = Bound(0.01, 0.02, (2.0, 4.0))
    assert bound.over(None) == bound
    assert bound.over(0.001) == bound
    assert bound.over(0.008) == replace(bound, warn=0.016, fail=0.032)
    assert Bound(0.0, 0.0).over(0.5) == Bound(0.0, 0.0)


def test_no_limit_fails_before_it_warns() -> None:
    for name, limits in PROFILES.items():
        for item in fields(Limits):
            bound = getattr(limits, item.name)
            ordered = bound.fail <= bound.warn if item.name == "min_top1" else bound.warn <= bound.fail
            assert ordered, (name, item.name)


def test_coarser_formats_allow_more() -> None:
    order = [PROFILES[name] for name in ("identity", "cast", "int8", "fp8", "nvfp4", "int4")]
    for finer, coarser in pairwise(order):
        for item in fields(Limits):
            pair = getattr(finer, item.name).fail, getattr(coarser, item.name).fail
            assert pair == tuple(sorted(pair, reverse=item.name == "min_top1")), item.name


def test_override_replaces_both_bounds_of_its_metric_only() -> None:
    limits = choose_limits("fp8", Overrides(max_kl=0.5, min_top1=0.0, max_layer_error=0.3))
    own = {
        "max_kl": Bound(0.5, 0.5),
        "max_mtp_kl": Bound(0.5, 0.5),
        "min_top1": Bound(0.0, 0.0),
        "max_layer_error": Bound(0.3, 0.3),
    }
    assert limits == replace(FP8, **own)
    assert choose_limits("fp8", Overrides()) == FP8


def test_equal_bits_are_asked_for_only_where_both_sides_were_computed_alike() -> None:
    alike = choose_limits("identity", Overrides())
    other = choose_limits("identity", Overrides(), computed_alike=False)
    assert judge(1e-9, alike.max_kl.over(1e-4)) is Verdict.FAIL
    assert judge(1.9e-4, other.max_kl.over(1e-4)) is Verdict.PASS
    assert judge(2.1e-4, other.max_kl.over(1e-4)) is Verdict.FAIL
    assert (alike.allows_flips, other.allows_flips) == (False, False)
    assert choose_limits("identity", Overrides(), computed_alike=False, has_floor=False) == PROFILES["cast"]


def test_activations_as_served_have_limits_of_their_own() -> None:
    full, served = (choose_limits("nvfp4", Overrides(), activations=how) for how in ("full", "as-served"))
    assert served.max_kl.fail > full.max_kl.fail
    weights_only = choose_limits("nvfp4-weight-only", Overrides(), activations="as-served")
    assert weights_only == PROFILES["nvfp4-weight-only"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_fails_whatever_its_error(value: float) -> None:
    assert judge(value, FP8.max_kl, se=math.inf) is Verdict.FAIL
    assert judge(value, FP8.max_kl, se=math.nan) is Verdict.FAIL


def test_outlier_by_hand() -> None:
    """Median 3, median absolute deviation 1: z of 20 is 17 / 1.4826."""
    values = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "e": 20.0}
    assert outliers(values) == (Outlier("e", 20.0, 3.0, pytest.approx(17 / 1.4826)),)


def test_both_conditions_of_an_outlier_count() -> None:
    close = {"a": 1.0, "b": 1.001, "c": 0.999, "d": 1.0, "e": 1.4}
    assert outliers(close) == ()
    wide = {"a": 1.0, "b": 4.0, "c": 2.0, "d": 8.0, "e": 12.0}
    assert outliers(wide) == ()


def test_zeros_and_few_values_are_no_siblings() -> None:
    assert outliers({"a": 1.0, "b": 1.0, "c": 1.0, "d": 9.0}) == ()
    assert outliers({**dict.fromkeys("abcdefgh", 0.0), "i": 1.0}) == ()
    assert outliers({**dict.fromkeys("abcd", 1.0), "e": math.nan, "f": math.inf}) == ()


def test_equal_siblings_make_any_larger_value_stand_out() -> None:
    (found,) = outliers({**dict.fromkeys("abcde", 1.0), "f": 1.6})
    assert (found.subject, found.z) == ("f", math.inf)


def test_layers_are_compared_by_half_and_the_mtp_layer_with_none() -> None:
    layers = [layer(index, attention=error(0.03 + index / 1000)) for index in range(6)]
    layers[4] = layer(4, attention=error(0.07), mlp=error(0.03))
    layers.append(layer(6, is_mtp=True, attention=error(0.5)))
    assert [outlier.subject for outlier in layer_outliers(layers)] == ["layer 4 attention"]


def test_an_expert_with_few_tokens_does_not_stand_out() -> None:
    values = experts(0.03, 0.031, 0.03, 0.029, 0.03, 0.07)
    assert [outlier.subject for outlier in layer_outliers([layer(1, experts=values)])] == ["layer 1 expert 5"]
    few = (*values[:5], replace(values[5], num_tokens=3))
    assert layer_outliers([layer(1, experts=few)]) == ()


def test_experts_within_the_noise_floor_do_not_stand_out() -> None:
    """Two of bf16 to fp16: 5e-8 beside 1e-8, where noise does 0.002."""
    values = experts(1e-8, 1.1e-8, 1e-8, 0.9e-8, 1e-8, 5e-8)
    assert layer_outliers([layer(1, experts=values)]) == ()
    assert len(layer_outliers([layer(1, mlp=error(floor=None), experts=values)])) == 1


def figures(name: str, relative: float) -> TensorFigures:
    return TensorFigures(name, Relation.ROUNDED, "fp8", "", 4, 0, "", 1, 0, "", relative, 1.0, 0.0, 1.0)


def test_tensors_are_compared_with_those_that_differ_in_their_last_index() -> None:
    experts_of_3 = [f"model.layers.3.mlp.experts.{index}.up_proj.weight" for index in range(6)]
    values = [0.026, 0.0261, 0.0259, 0.026, 0.0262, 0.05]
    tensors = [figures(name, value) for name, value in zip(experts_of_3, values, strict=True)]
    tensors += [figures(f"model.layers.{index}.self_attn.q_proj.weight", 0.09) for index in range(6)]
    found = tensor_outliers(Certificate(tuple(tensors), (), 0))
    assert [outlier.subject for outlier in found] == [f"tensor {experts_of_3[5]}"]
