"""The world a process finds itself in."""

from __future__ import annotations

import pytest

from hasten.distributed import World, current
from hasten.errors import RunError


def test_a_process_without_torchrun_is_alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert current() == World(0, 1)
    assert current().is_main


def test_torchrun_says_who_one_is(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert current() == World(3, 4)
    assert not current().is_main


@pytest.mark.parametrize(("rank", "size"), [("4", "4"), ("-1", "4"), ("0", "0"), ("one", "4"), ("0", "\x1b[2J")])
def test_an_impossible_world_is_refused_in_plain_text(monkeypatch, rank, size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(RunError) as error:
        current()
    assert "\x1b" not in str(error.value)
