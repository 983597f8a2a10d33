"""What a recipe says about the text: mixtures, packing, and what is refused before any text is read."""

from __future__ import annotations

import pytest

from hasten.data.fitting import OVERFLOWS, PACKINGS
from hasten.data.mixture import SMALLEST_SHARE, Proportions
from hasten.errors import DataError, RecipeError
from hasten.recipe import resolve
from hasten.recipe.data import DataChoices
from hasten.recipe.schema import Schema

TWO = "data.train=['a.txt', 'b/']"


def data_of(*settings):
    return resolve(None, list(settings)).recipe.data


def refusal(*settings):
    with pytest.raises(RecipeError) as caught:
        resolve(None, list(settings))
    return str(caught.value)


# --- mixtures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["[0.7, 0.3]", "[7,3]", "[0.7,0.3,]", "[1e-3, 1e3]"])
def test_weights_are_as_they_were_given(text):
    choices = data_of(TWO, f"data.weights={text}")
    assert list(choices.weights) == [float(number) for number in text.strip("[],").split(",")]
    assert choices.build().apart


def test_without_weights_the_sources_are_one_corpus():
    assert data_of(TWO).weights is None
    assert data_of(TWO, "data.weights=none").weights is None
    assert not data_of(TWO).build().apart
    assert data_of(TWO).build().train == ("a.txt", "b/")


def test_a_mixture_is_the_same_after_it_was_written_down():
    recipe = resolve(None, [TWO, "data.weights=[2, 0.25]", "data.packing=pad", "data.overflow=drop"]).recipe
    assert resolve(recipe.to_toml()).recipe == recipe
    assert "weights = [\n    2.0,\n    0.25,\n]" in recipe.to_toml()
    assert recipe.difference(resolve(None, [TWO]).recipe) == [
        "data.weights: [2.0, 0.25] -> none",
        'data.packing: "pad" -> "best_fit"'.replace('"', ""),
        "data.overflow: drop -> split",
    ]


def test_a_mapping_may_give_weights_as_a_tuple():
    recipe = resolve({"data": {"train": ["a.txt", "b/"], "weights": (1, 2)}}).recipe
    assert recipe.data.weights == (1.0, 2.0)


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ("[0.7]", "[0.7] has 1 number for the 2 sources of data.train: give one for each"),
        ("[1, 2, 3]", "[1.0, 2.0, 3.0] has 3 numbers for the 2 sources of data.train"),
        ("[]", "[] has 0 numbers for the 2 sources"),
        ("[0.7, 0]", "expected a list of numbers above 0, one for each source of data.train, as [0.7, 0.3]"),
        ("[0.7, -0.3]", "expected a list of numbers above 0"),
        ("[0.7, inf]", "expected a list of numbers above 0"),
        ("[0.7, nan]", "expected a list of numbers above 0"),
        ("[0.7, true]", "expected a list of numbers above 0"),
        ("[0.7, 'b']", "expected a list of numbers above 0"),
        ("0.7", "expected a list of numbers above 0"),
        ("half", "expected a list of numbers above 0"),
        ("[1, 1e-13]", "gives 'b/' less than one row in 10**12: leave that source out"),
    ],
)
def test_weights_that_are_none_are_refused(weights, told):
    message = refusal(TWO, f"data.weights={weights}")
    assert told in message
    assert message.startswith("data.weights=")


@pytest.mark.parametrize("train", ["data.train=a.txt", "data.train=['a.txt']", "seed=1"])
def test_weights_without_a_list_are_refused(train):
    message = refusal(train, "data.weights=[1]")
    assert "has no effect with the one source data.train=" in message
    assert "give a list of sources" in message


def test_a_source_named_twice_in_a_mixture_is_refused():
    assert "data.train names 'a' twice" in refusal("data.train=['a', 'b', 'a']", "data.weights=[1, 1, 1]")
    assert data_of("data.train=['a', 'b', 'a']").train == ("a", "b", "a")


def test_the_recipe_takes_the_weights_that_the_mixture_takes():
    assert data_of(TWO, f"data.weights=[1, {SMALLEST_SHARE * 1.01}]").weights
    Proportions([1, SMALLEST_SHARE * 1.01])
    assert "less than one row" in refusal(TWO, f"data.weights=[1, {SMALLEST_SHARE * 0.99}]")
    with pytest.raises(DataError):
        Proportions([1, SMALLEST_SHARE * 0.99])


# --- packing ------------------------------------------------------------------------------------------------------


def test_every_way_to_pack_can_be_chosen():
    fields = DataChoices.model_fields
    assert set(fields["packing"].annotation.__args__) == set(PACKINGS)
    assert fields["overflow"].annotation.__args__ == OVERFLOWS
    for packing in PACKINGS:
        assert data_of(f"data.packing={packing}").packing == packing


@pytest.mark.parametrize("overflow", ["truncate", "drop"])
def test_overflow_has_no_meaning_for_chunks(overflow):
    message = refusal("data.packing=chunk", f"data.overflow={overflow}")
    assert f"data.overflow='{overflow}' has no effect with data.packing='chunk'" in message
    for packing in ("best_fit", "pad"):
        assert data_of(f"data.packing={packing}", f"data.overflow={overflow}").overflow == overflow
    assert data_of("data.packing=chunk", "data.overflow=split").packing == "chunk"


def test_unknown_names_are_refused_with_the_known_ones():
    assert "expected one of 'best_fit', 'chunk', 'pad'" in refusal("data.packing=bfd")
    assert "expected one of 'split', 'truncate', 'drop'" in refusal("data.overflow=cut")
    assert "did you mean 'data.weights'" in refusal("data.weight=[1, 2]")


def test_the_defaults_lose_nothing():
    assert (data_of().packing, data_of().overflow, data_of().weights) == ("best_fit", "split", None)


def test_every_setting_says_what_it_accepts():
    from hasten.recipe.recipe import Recipe

    assert Schema(Recipe).expected("data.weights").startswith("a list of numbers above 0")
