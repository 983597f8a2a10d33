"""Every choice of a run as one frozen value, and the ways to write it: TOML, ``key=value``, a mapping."""

from __future__ import annotations

from hasten.recipe.recipe import Recipe, Resolved, resolve, schema

__all__ = ["Recipe", "Resolved", "resolve", "schema"]
