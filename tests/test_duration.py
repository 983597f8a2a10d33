"""Durations: what text they accept, what they refuse, and what they are in steps."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.duration import Duration
from hasten.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        (2000, 2000, "steps"),
        ("2000", 2000, "steps"),
        (" 2000 ", 2000, "steps"),
        ("2e3", 2000, "steps"),
        ("10steps", 10, "steps"),
        ("5%", 0.05, "share"),
        ("7%", 0.07, "share"),
        (".5%", 0.005, "share"),
        ("100%", 1.0, "share"),
        ("300tok", 300, "tokens"),
        ("5ktok", 5e3, "tokens"),
        ("20Mtok", 20e6, "tokens"),
        ("1.5Gtok", 1.5e9, "tokens"),
        ("20 Mtok", 20e6, "tokens"),
        ("60s", 60, "seconds"),
        ("0.5s", 0.5, "seconds"),
        ("15min", 900, "seconds"),
        ("2h", 7200, "seconds"),
        ("1d", 86400, "seconds"),
        ("1ep", 1, "epochs"),
        ("0.5ep", 0.5, "epochs"),
        ("0", 0, "steps"),
        ("-0%", 0, "share"),
    ],
)
def test_text_is_read_as_value_and_unit(text, value, unit):
    assert Duration.parse(text) == Duration(value, unit)


@pytest.mark.parametrize(
    ("text", "readings"),
    [
        ("15m", ["15min", "15Mtok"]),
        ("20M", ["20Mtok", "20000000 (steps)"]),
        ("20k", ["20ktok", "20000 (steps)"]),
        ("1.5K", ["1.5ktok", "1500 (steps)"]),
        ("2B", ["2Gtok", "2000000000 (steps)"]),
    ],
)
def test_a_bare_multiple_is_refused_with_both_readings(text, readings):
    with pytest.raises(RecipeError, match="two ways") as error:
        Duration.parse(text)
    assert all(reading in str(error.value) for reading in readings)


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "fast", "s", "True", "5 5", "5%%", "1_000", "0x10", "٣", "1.5.2s", "15minutes"),
        *("-5", "-5%", "-1s", "nan", "nan%", "nanm", "nanM", "inf", "infs"),
        *("1e999", "1e9999s", "1e400h", "9999999999e999Ttok", "1.5", "0.05", "0.5tok"),
    ],
)
def test_what_is_no_span_is_refused(text):
    with pytest.raises(RecipeError):
        Duration.parse(text)


@pytest.mark.parametrize(("text", "unit"), [("20mtok", "Mtok"), ("20KTOK", "ktok"), ("5S", "s"), ("5mins", "min")])
def test_an_unknown_unit_names_the_nearest(text, unit):
    with pytest.raises(RecipeError, match=f"did you mean '{unit}'"):
        Duration.parse(text)


def test_zero_is_refused_only_where_something_must_happen():
    assert Duration.parse("0s").value == 0
    with pytest.raises(RecipeError, match="above zero"):
        Duration.parse("0s", positive=True)
    assert Duration.parse("0.001s", positive=True).value == 0.001


def test_no_error_carries_control_characters_of_the_text():
    with pytest.raises(RecipeError) as error:
        Duration.parse("\x1b[31m5%")
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "unit"),
    [(-1, "steps"), (math.nan, "share"), (math.inf, "seconds"), (1.5, "steps"), (0.5, "tokens"), (1, "parsecs")],
)
def test_a_value_that_is_no_span_cannot_be_built(value, unit):
    with pytest.raises(RecipeError):
        Duration(value, unit)


@pytest.mark.parametrize(
    "text",
    [
        *("0", "1", "2000", "1000000", "0%", "2.5%", "5%", "100%", "0.5ep", "1ep"),
        *("300tok", "5ktok", "20Mtok", "1.5Gtok"),
        *("0s", "0.5s", "59s", "1min", "1.5min", "15min", "2h", "1.5d", "90061s"),
    ],
)
def test_canonical_text_comes_back(text):
    assert str(Duration.parse(text)) == text


def test_longer_text_becomes_the_shortest_usual_one():
    given = ["120s", "60min", "24h", "1000tok", "0.5Mtok", "5.0%", "1e3"]
    assert [str(Duration.parse(text)) for text in given] == ["2min", "1h", "1d", "1ktok", "500ktok", "5%", "1000"]


@given(st.floats(0, 1e300), st.sampled_from(["share", "seconds", "epochs"]))
def test_every_value_comes_back_from_its_text_bit_for_bit(value, unit):
    duration = Duration(value, unit)
    assert Duration.parse(str(duration)) == duration


@given(st.integers(0, 2**80), st.sampled_from(["steps", "tokens"]))
def test_every_count_comes_back_from_its_text(value, unit):
    duration = Duration(float(value), unit)
    assert Duration.parse(str(duration)) == duration


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("0", 0),
        ("12", 12),
        ("8191tok", 1),
        ("8192tok", 1),
        ("8193tok", 2),
        ("0%", 0),
        ("0.01%", 1),
        ("7%", 7),
        ("7.01%", 8),
        ("100%", 100),
        ("1ep", 13),
        ("2ep", 25),
        ("60s", None),
    ],
)
def test_steps_cover_the_span(text, steps):
    duration = Duration.parse(text)
    assert duration.to_steps(total_steps=100, tokens_per_step=8192, steps_per_epoch=12.5) == steps


@given(st.integers(1, 99), st.integers(1, 10**9))
def test_whole_percents_of_hundreds_are_whole_steps(percent, hundreds):
    steps = Duration.parse(f"{percent}%").to_steps(total_steps=100 * hundreds, tokens_per_step=1)
    assert steps == percent * hundreds


@pytest.mark.parametrize("text", ["5%", "1ep"])
def test_a_part_of_something_unknown_is_no_number_of_steps(text):
    with pytest.raises(RecipeError, match="unknown length"):
        Duration.parse(text).to_steps(total_steps=None, tokens_per_step=1)
