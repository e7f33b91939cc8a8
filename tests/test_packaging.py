"""What whoever installs maxattn gets: one package, complete and quick to import."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent

BESIDE_MAXATTN = ("backends/other/src/maxattn_other/__init__.py", "plugins/other.py", "maxattn_other/__init__.py")

HEAVY_OR_OPTIONAL = (
    "PIL",
    "matplotlib",
    "mlxtend",
    "rich",
    "sympy",
    "timm",
    "torch._dynamo",
    "torch._inductor",
    "torchvision",
    "triton",
    "typer",
)


def python(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def source_files() -> list[str]:
    """The files that are, or could be, committed."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted({name for name in names if name and (REPOSITORY / name).is_file()})


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built where other packages lie beside `maxattn`."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in source_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, source / name)
    for name in BESIDE_MAXATTN:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    built = python("-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, cwd=out)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


def packaged(wheel: Path) -> set[str]:
    names = zipfile.ZipFile(wheel).namelist()
    return {name for name in names if not name.split("/")[0].endswith(".dist-info")}


def test_the_wheel_holds_every_file_of_maxattn_and_nothing_else(wheel: Path) -> None:
    assert packaged(wheel) == {name for name in source_files() if name.startswith("maxattn/")}


def test_the_wheel_holds_presets_and_the_marker_of_typed_packages(wheel: Path) -> None:
    names = packaged(wheel)
    assert "maxattn/py.typed" in names
    assert any(Path(name).match("maxattn/presets/*.yaml") for name in names)


def test_backends_is_no_package(tmp_path: Path) -> None:
    run = python("-I", "-c", "import backends", cwd=tmp_path)
    assert run.stderr.endswith("ModuleNotFoundError: No module named 'backends'\n")


def test_the_unpacked_wheel_imports_and_brings_no_package_backends(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = "import sys; sys.path.insert(0, sys.argv[1]); import maxattn; print(maxattn.__file__); import backends"
    run = python("-I", "-c", program, tmp_path, cwd=tmp_path)
    assert run.stdout == f"{tmp_path / 'maxattn' / '__init__.py'}\n", run.stderr
    assert run.stderr.endswith("ModuleNotFoundError: No module named 'backends'\n")


def test_import_costs_at_most_a_fifth_of_a_second_over_torch() -> None:
    # Processor time: what else runs on the machine does not count.
    program = "import time, torch; start = time.process_time(); import maxattn; print(time.process_time() - start)"
    python("-c", program, cwd=REPOSITORY)  # compiles the modules that have changed
    runs = [python("-c", program, cwd=REPOSITORY) for _ in range(3)]
    assert all(run.returncode == 0 for run in runs), runs
    assert statistics.median(float(run.stdout) for run in runs) <= 0.2


def test_import_leaves_heavy_and_optional_packages_alone() -> None:
    program = "import sys, torch; before = set(sys.modules); import maxattn; print(*sys.modules.keys() - before)"
    run = python("-c", program, cwd=REPOSITORY)
    imported = run.stdout.split()
    assert "maxattn" in imported, run.stderr
    assert [name for name in imported if f"{name}.".startswith(tuple(f"{heavy}." for heavy in HEAVY_OR_OPTIONAL))] == []
