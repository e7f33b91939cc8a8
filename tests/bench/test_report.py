"""`maxattn bench report`: pages and plots are what the JSON says, the repository's too; and machines stay apart."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from maxattn.bench import Result, Row, Time, report, tables, this_machine

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks"


def time(median: float) -> Time:
    return Time(median=median, low=0.9 * median, high=1.2 * median, samples=5)


def networks() -> Result:
    case: dict[str, str | int] = {"network": "nano", "img_size": 28, "batch": 4, "dtype": "float32"}
    medians = {
        ("maxattn plain", "maxattn", "eager"): 0.20,
        ("maxattn optimized", "maxattn", "eager"): 0.10,
        ("maxattn optimized", "maxattn", "compiled"): 0.08,
        ("timm, contiguous", "timm", "eager"): 0.40,
        ("timm, channels-last", "timm", "eager"): 0.25,
        ("timm, channels-last", "timm", "compiled"): 0.12,
    }
    rows = [
        Row(case=case, candidate=f"{name}, {mode}", library=library, mode=mode, time=time(median), mib=2.5)  # type: ignore[arg-type]
        for (name, library, mode), median in medians.items()
    ]
    missing = Row(
        case=case, candidate="torchvision", library="torchvision", note="not installed: pip install torchvision"
    )
    return Result(kind="model", machine=this_machine(), rows=(*rows, missing))


def operator() -> Result:
    rows = []
    for what, floor in (("forward", 1e-4), ("training", 3e-4)):
        case: dict[str, str | int] = {"batch": 8, "size": 56, "width": 64, "window": 7, "axis": "grid", "pass": what}
        rows += [
            Row(case=case, candidate="floor", library="floor", time=Time(median=floor)),
            Row(case=case, candidate="sdpa", library="sdpa", time=time(4 * floor), mib=12.0),
            Row(case=case, candidate="triton", library="triton", note="not able: no support for cpu"),
        ]
    return Result(kind="op", machine=this_machine(), rows=tuple(rows))


def scaling() -> Result:
    rows = [
        Row(
            case={"network": "nano", "img_size": n, "batch": 1, "dtype": "float32"},
            candidate=kind,
            library="maxattn",
            time=time(1e-7 * (n * n) ** power) if kind == "windows" or n < 1792 else None,
            mib=1e-3 * n * n,
            note="" if kind == "windows" or n < 1792 else "left out: a call would take about 99 s",
        )
        for n in (224, 448, 896, 1792)
        for kind, power in (("windows", 1), ("full attention", 2))
    ]
    return Result(kind="scaling", machine=this_machine(), rows=tuple(rows))


def elsewhere(result: Result) -> Result:
    return replace(result, machine=replace(result.machine, device="cuda", gpu="NVIDIA H200"))


def put(folder: Path, *results: Result) -> None:
    for result in results:
        result.write(folder / report.RESULTS)


def test_tables_of_networks_tell_times_rates_and_how_much_faster_the_best_is() -> None:
    text = tables.networks(networks())
    assert "| maxattn optimized, eager | 100 ms | 90 ms to 120 ms | 40 | 2.5 | - |" in text
    assert "| eager | 2.50 |" in text
    assert "| compiled | 1.50 |" in text
    assert "| the better | 1.50 |" in text
    assert "- torchvision: not installed: pip install torchvision" in text


def test_tables_of_the_operator_tell_multiples_of_the_floor_and_memory() -> None:
    text = tables.op(operator())
    assert "| 8 | 56 | 64 | 7 | grid | 100 | 400 (4.00) |" in text
    assert "| 8 | 56 | 64 | 7 | grid | 300 | 1,200 (4.00) |" in text
    assert "| 8 | 56 | 64 | 7 | grid | 12 |" in text
    assert "- triton: not able: no support for cpu" in text


def test_tables_of_scaling_tell_exponents_and_what_is_left_out() -> None:
    text = tables.scaling(scaling())
    assert "| windows | 1 | 1 |" in text
    assert "| full attention | 2 | 1 |" in text
    assert "| 1792 x 1792 | 321 ms | 3,211 | - | - |" in text
    assert "- full attention at 1792: left out: a call would take about 99 s" in text


def test_machines_stay_side_by_side_and_kinds_have_pages(tmp_path: Path) -> None:
    put(tmp_path, networks(), elsewhere(networks()), operator(), elsewhere(scaling()))
    written = {path.name for path in report.write(tmp_path)}
    ours = this_machine().name
    assert written == {
        "README.md",
        "model.md",
        "op.md",
        "scaling.md",
        f"{ours}-model.svg",
        f"{ours}-op.svg",
        "nvidia-h200-model.svg",
        "nvidia-h200-scaling.svg",
    }
    page = (tmp_path / "model.md").read_text("utf-8")
    for told in (this_machine().cpu, "## NVIDIA H200", "nvidia-h200-model.json", f"({ours}-model.svg)"):
        assert told in page
    index = (tmp_path / "README.md").read_text("utf-8")
    for kind in ("model", "op", "scaling"):
        assert f"({kind}.md)" in index
    for plot in tmp_path.glob("*.svg"):
        ElementTree.parse(plot)


def test_the_same_results_give_the_same_files(tmp_path: Path) -> None:
    put(tmp_path, networks(), operator(), scaling())
    first, second = ({path: path.read_bytes() for path in report.write(tmp_path)} for _ in range(2))
    assert len(first) == 7
    assert first == second


def test_pages_of_results_that_are_gone_go_too(tmp_path: Path) -> None:
    put(tmp_path, networks(), operator())
    report.write(tmp_path)
    (tmp_path / report.RESULTS / operator().file_name).unlink()
    report.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "model.md",
        "results",
        f"{this_machine().name}-model.svg",
    }


def test_without_results_nothing_is_written(tmp_path: Path) -> None:
    assert report.write(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_result_without_any_time_has_a_page_and_no_plot(tmp_path: Path) -> None:
    bare = networks()
    put(tmp_path, replace(bare, rows=bare.rows[-1:]))
    assert {path.name for path in report.write(tmp_path)} == {"README.md", "model.md"}
    assert "not installed" in (tmp_path / "model.md").read_text("utf-8")


def test_without_matplotlib_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, networks())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'maxattn\[plot\]'"):
        report.write(tmp_path)


def test_the_pages_of_this_repository_are_what_its_results_say(tmp_path: Path) -> None:
    shutil.copytree(BENCHMARKS / report.RESULTS, tmp_path / report.RESULTS)
    for path in report.write(tmp_path):
        assert (BENCHMARKS / path.name).exists()
        if path.suffix == ".md":
            assert path.read_text("utf-8") == (BENCHMARKS / path.name).read_text("utf-8"), "run: maxattn bench report"
