"""Named architectures as data: one YAML file a family, a name a top-level key, `.name` for shared parts."""

from __future__ import annotations

from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from maxattn.spec import MaxViTSpec

SUFFIXES = (".yaml", ".yml", ".json")


@cache
def _presets() -> dict[str, dict[str, Any]]:
    found = {}
    for file in sorted(resources.files(__name__).iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            family = yaml.safe_load(file.read_text(encoding="utf-8"))
            found.update({name: data for name, data in family.items() if not name.startswith(".")})
    return found


def list_presets(pattern: str = "*") -> list[str]:
    """Names of the presets that match a shell pattern.

    Example:
        >>> list_presets("maxvit_tiny_tf_*")
        ['maxvit_tiny_tf_224', 'maxvit_tiny_tf_384', 'maxvit_tiny_tf_512']
    """
    return sorted(name for name in _presets() if fnmatchcase(name, pattern))


def load_spec(source: str | Path | dict[str, Any] | MaxViTSpec) -> MaxViTSpec:
    """A spec from a preset's name, a YAML or JSON file, plain data, or a spec itself.

    Raises:
        ValueError: for an unknown preset, naming the nearest, or an invalid spec, naming the field.
        TypeError: for a source of another type.
        FileNotFoundError: for a path with a spec's suffix that is no file.

    Example:
        >>> load_spec({"stages": [{"width": 32, "depth": 1}]}).stages[0].width
        32
    """
    if isinstance(source, MaxViTSpec):
        return source
    if isinstance(source, dict):
        return MaxViTSpec.read(source)
    if not isinstance(source, (str, Path)):
        raise TypeError(f"a spec is a preset's name, a path, a dict or a MaxViTSpec, not {type(source).__name__}")
    if isinstance(source, Path) or source.endswith(SUFFIXES):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"no spec file {path}; give a YAML or JSON file, or a preset: maxattn spec list")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text file in UTF-8: {error}") from None
        return MaxViTSpec.parse(text, path)
    if source not in _presets():
        near = get_close_matches(source, _presets(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "maxattn.list_presets() names them all"
        raise ValueError(f"there is no preset {source!r}; {hint}")
    return MaxViTSpec.read({"name": source, **_presets()[source]})
