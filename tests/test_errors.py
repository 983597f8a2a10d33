"""Errors: one family, one exit code, near names, and no terminal driven by text."""

from __future__ import annotations

import pytest

from hasten.errors import CheckpointError, DataError, HastenError, RecipeError, RunError, nearest, printable


@pytest.mark.parametrize("kind", [RecipeError, DataError, CheckpointError, RunError])
def test_every_error_is_caught_as_one_family_with_exit_code_two(kind):
    error = kind("lr=-1 is below 0; give a number above 0.")
    assert isinstance(error, HastenError)
    assert error.exit_code == 2
    assert str(error) == "lr=-1 is below 0; give a number above 0."


def test_a_near_name_is_offered():
    assert nearest("learing_rate", ["learning_rate", "seed"]) == ", did you mean 'learning_rate'?"


def test_two_near_names_are_both_offered():
    assert nearest("model.heads", ["model.num_heads", "model.heads_num"]).count("'") == 4


@pytest.mark.parametrize("name", ["zzz", ""])
def test_nothing_is_offered_where_nothing_is_near(name):
    assert nearest(name, ["lr", "seed"]) == ""
    assert nearest(name, []) == ""


@pytest.mark.parametrize(
    "character",
    [
        *("\x00", "\x07", "\x08", "\r", "\x1b", "\x7f", "\x85", "\x9b", "\ud800"),
        *("\u2028", "\u2029", "\u061c", "\u200f", "\u202e", "\u2066"),
    ],
)
def test_what_drives_a_terminal_is_escaped(character):
    shown = printable(f"a{character}b")
    assert character not in shown
    assert shown.startswith("a\\")
    assert shown.endswith("b")
    assert shown.isascii()


@pytest.mark.parametrize(
    "text", ["plain", "line\nline\tcolumn", "naïve 日本語 🙂", "", " ~\xa0\u2027\u202f\u2065\u206a"]
)
def test_ordinary_text_stays_as_it_is(text):
    assert printable(text) == text
