"""Writes docs/recipes.md from the types of a recipe: every key, its default, what it accepts, what it means.

python docs/generate_recipes.py            a test compares the page with this
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from pydantic import BaseModel

from hasten.duration import Duration
from hasten.model import SIZES
from hasten.recipe import Recipe, names, schema

HEAD = """# Recipes

A recipe is every choice of a run. Write it as TOML, as `key=value` on the command line, or both; later ones win:

    hasten train recipe.toml lr=2e-3 budget=15min clip=none

A bare name chooses the variant of a table (`schedule=linear`, `precision=bf16`, `model=micro`). Durations are one type:
`2000` (steps), `5%` (of the run), `20Mtok`, `60s`, `15min`, `2h`, `1ep`; a bare `15m` or `20M` is refused with both
readings. The resolved recipe of a run is its `recipe.toml`.

This page is generated from the types by `docs/generate_recipes.py`.
"""


def meanings(table: type[BaseModel]) -> dict[str, str]:
    """Return what the ``Args:`` of a class and its bases say of each setting."""
    found: dict[str, str] = {}
    for base in reversed(table.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        _, _, args = text.partition("Args:\n")
        for match in re.finditer(r"^ {4}([a-z0-9_, ]+): (.*?)(?=^ {4}\S|\Z)", args, re.M | re.S):
            for name in match[1].split(", "):
                found[name.strip()] = " ".join(match[2].split())
    return found


def shown(value: object) -> str:
    """Return a default as it would be typed."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"`{value if isinstance(value, Duration) else str(value)}`".replace("|", "\\|")


def page() -> str:
    """Return docs/recipes.md."""
    keys, lines = schema(), [HEAD]
    own = meanings(Recipe)
    lines += ["## Top level\n", "| key | default | accepts | meaning |", "|---|---|---|---|"]
    for key in keys.leaves:
        if "." not in key:
            lines.append(f"| `{key}` | {shown(keys.default(key))} | {keys.expected(key)} | {own.get(key, '')} |")
    for table, variants in keys.tables.items():
        lines += ["", f"## {table}\n", "| key | default | accepts | meaning |", "|---|---|---|---|"]
        for key in (key for key in keys.leaves if key.startswith(f"{table}.")):
            leaf = key.partition(".")[2]
            says = next((m[leaf] for t in variants.values() if leaf in (m := meanings(t))), "")
            if leaf == "name":
                says = "the preset" if table == "model" else "which one"
            only = list(keys.leaves[key])
            if keys.has_variants(table) and len(only) < len(variants):
                says += f" (for {', '.join(only)})"
            default = keys.default(key, only[0] if keys.has_variants(table) else "")
            if leaf == "name" and keys.has_variants(table):
                default = keys.default_names[table]
            lines.append(f"| `{key}` | {shown(default)} | {keys.expected(key)} | {says} |".replace("``", "`"))
    lines += ["", "## Model presets\n", "| name | layers | width | heads | key-value heads | MLP width | tied |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, size in SIZES.items():
        parts = (size[k] for k in ("num_layers", "width", "num_heads", "num_kv_heads", "mlp_width"))
        lines.append(f"| `{name}` | {' | '.join(str(part) for part in parts)} | {size.get('tied', False)} |")
    lines += ["", "## Short names\n", ", ".join(f"`{short}` = `{full}`" for short, full in names.SHORT.items()), ""]
    lines += ["## Names known from other trainers\n", "Accepted, and a note says which key they set.\n"]
    lines += ["| key | names |", "|---|---|"]
    by_key: dict[str, list[str]] = {}
    for other, key in names.RENAMED.items():
        by_key.setdefault(key, []).append(other)
    lines += [f"| `{key}` | {', '.join(f'`{other}`' for other in sorted(others))} |" for key, others in by_key.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "recipes.md").write_text(page(), encoding="utf-8")
