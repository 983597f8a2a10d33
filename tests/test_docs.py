"""The documents: generated pages are current, links resolve, code blocks in the README run."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_page_of_settings_is_what_the_types_say() -> None:
    spec = importlib.util.spec_from_file_location("generate_recipes", ROOT / "docs" / "generate_recipes.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    expected = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert generator.page() == expected, "run: python docs/generate_recipes.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_the_parts_shown_in_the_readme_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    parts = next(block for block in blocks if "as_lr_scheduler" in block)
    says = "print([group['name'] for group in opt.param_groups])"
    done = subprocess.run([sys.executable, "-c", f"{parts}\n{says}"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['head', 'embeddings', 'vectors']"


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run_and_assert_their_outcome(example: Path) -> None:
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
