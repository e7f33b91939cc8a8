"""The documentation runs: every Python block of the README and the guide, and what it says of hooks and presets."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from maxattn import hookspecs
from maxattn.spec import MaxViTSpec
from maxattn.train.recipe import Recipe, TrainConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]


def blocks(language: str) -> list[pytest.param]:
    found = []
    for page in PAGES:
        for number, code in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.DOTALL)):
            found.append(pytest.param(code, id=f"{page.stem}-{number}"))
    return found


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code: str) -> None:
    exec(compile(code, "documentation", "exec"), {})


@pytest.mark.parametrize("code", blocks("yaml"))
def test_yaml_blocks_are_specs(code: str) -> None:
    assert MaxViTSpec.parse(code).stages


@pytest.mark.parametrize("code", blocks("yaml config"))
def test_training_configs_are_read(code: str) -> None:
    assert TrainConfig.parse(code).recipe.epochs


def test_every_field_of_the_recipe_is_in_the_guide() -> None:
    guide = (ROOT / "docs" / "guide" / "training.md").read_text("utf-8")
    for name, field in Recipe.model_fields.items():
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        assert f"| `{name}` | {default} | {field.description} |" in guide


def test_the_readme_example_has_ten_lines_of_code() -> None:
    code = re.search(r"## Ten lines\n\n```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert code is not None
    assert len([line for line in code[1].splitlines() if line.strip()]) <= 10


def test_every_hook_has_a_docstring_and_is_in_the_guide() -> None:
    guide = (ROOT / "docs" / "guide" / "backends.md").read_text("utf-8")
    hooks = [name for name, _ in inspect.getmembers(hookspecs, inspect.isfunction) if name.startswith("maxattn_")]
    assert hooks
    for name in hooks:
        assert inspect.getdoc(getattr(hookspecs, name))
        assert f"`{name}(" in guide


def test_relative_links_lead_somewhere() -> None:
    for page in [*PAGES, *sorted((ROOT / "docs" / "adr").glob("*.md"))]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
