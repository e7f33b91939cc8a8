"""`maxattn bench report`: pages and plots are what the JSON says, the repository's too; and machines stay apart."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import pytest

from maxattn.bench import Result, Row, Time, plots, report, tables, this_machine
from maxattn.bench.results import Work

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
        Row(
            case=case,
            candidate=f"{name}, {mode}",
            library=library,
            mode=mode,  # type: ignore[arg-type]
            time=time(median),
            mib=2.5,
            attention="sdpa" if library == "maxattn" else "",
        )
        for (name, library, mode), median in medians.items()
    ]
    missing = Row(
        case=case, candidate="torchvision", library="torchvision", note="not installed: pip install torchvision"
    )
    return Result(kind="model", machine=this_machine(), rows=(*rows, missing))


def operator(*biases: str) -> Result:
    rows = []
    shape = {"batch": 8, "size": 56, "width": 64, "window": 7, "axis": "grid"}
    for bias, what in product(biases or ("float32",), ("forward", "training")):
        floor = {"forward": 1e-4, "training": 3e-4}[what]
        case: dict[str, str | int] = {**shape, "bias": bias, "pass": what}
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
            attention="sdpa",
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


def test_tables_of_networks_tell_whose_attention_was_measured() -> None:
    ours = ["maxattn plain, eager", "maxattn optimized, eager", "maxattn optimized, compiled"]
    assert f"- attention by sdpa: {'; '.join(ours)}\n" in tables.networks(networks())
    first, *rest = networks().rows
    text = tables.networks(replace(networks(), rows=(replace(first, attention="triton"), *rest)))
    assert f"- attention by triton: {ours[0]}\n- attention by sdpa: {'; '.join(ours[1:])}\n" in text


def test_tables_of_networks_tell_what_bounds_them() -> None:
    plain = networks()
    work = [
        Work(case=plain.rows[0].case, kind="depthwise", bytes=3 * 10**9, flops=2 * 10**9),
        Work(case=plain.rows[0].case, kind="mlp", bytes=10**9, flops=10**12),
        Work(case={"batch": 256}, kind="mlp", bytes=10**15, flops=10**15),
    ]
    on_gpu = replace(plain, work=tuple(work), settings={"bytes_per_second": 1e11, "flops_per_second": 2e13})
    text = tables.networks(on_gpu)
    assert "| depthwise | 3 | 2 | 30 ms |" in text
    assert "| mlp | 1 | 1,000 | 50 ms |" in text
    assert "| all | 4 | 1,002 | 80 ms |" in text
    assert "the fastest of ours takes 1.00 times that of all" in text
    timed = replace(on_gpu, work=(replace(work[0], seconds=0.042), *work[1:]))
    assert "| depthwise | 3 | 2 | 30 ms | 42 ms | 12 ms |" in tables.networks(timed)
    assert "| mlp | 1 | 1,000 | 50 ms | - | - |" in tables.networks(timed)
    on_cpu = replace(on_gpu, settings={"flops_per_second": 2e13})
    assert "| depthwise | 3 | 2 | 100 us |" in tables.networks(on_cpu)
    assert "floor" not in tables.networks(plain)


def test_a_time_without_quartiles_has_no_spread() -> None:
    rows = tuple(replace(row, time=row.time and Time(median=row.time.median)) for row in operator().rows)
    assert "| grid | float32 | 100 | 400 (4.00) |" in tables.op(replace(operator(), rows=rows))


def test_a_section_says_whether_its_machine_checked_what_it_timed(tmp_path: Path) -> None:
    put(tmp_path, operator(), replace(elsewhere(operator()), checked=True))
    report.write(tmp_path)
    sections = (tmp_path / "op.md").read_text("utf-8").split("\n## ")[1:]
    checked, unchecked = sorted(sections, key=lambda section: not section.startswith("NVIDIA H200"))
    assert "Checked before, in the same run: every backend against the specification in fp64" in checked
    assert report.NOT_CHECKED not in checked
    assert report.NOT_CHECKED in unchecked


def test_a_section_says_that_its_result_is_not_finished(tmp_path: Path) -> None:
    put(tmp_path, operator(), replace(operator(), finished=False))
    report.write(tmp_path)
    finished, unfinished = (tmp_path / "op.md").read_text("utf-8").split("\n## ")[1:]
    assert unfinished.startswith(finished.partition("\n")[0] + ", not finished\n")
    assert "**Not finished:**" in unfinished
    assert "ot finished" not in finished
    assert (tmp_path / "README.md").read_text("utf-8").count("(op.md), not finished |") == 1


def test_files_of_others_stay(tmp_path: Path) -> None:
    put(tmp_path, networks(), operator())
    report.write(tmp_path)
    (tmp_path / "logo.svg").write_text("<svg/>", encoding="utf-8")
    (tmp_path / "scaling.md").write_text("how 'maxattn bench report' scales", encoding="utf-8")
    (tmp_path / report.RESULTS / operator().file_name).unlink()
    with pytest.raises(FileExistsError, match=r"scaling\.md was not written by 'maxattn bench'"):
        report.write(tmp_path)
    assert (tmp_path / "op.md").exists()
    (tmp_path / "scaling.md").rename(tmp_path / "notes.md")
    report.write(tmp_path)
    assert not (tmp_path / "op.md").exists()
    assert (tmp_path / "logo.svg").read_text("utf-8") == "<svg/>"
    assert (tmp_path / "notes.md").read_text("utf-8") == "how 'maxattn bench report' scales"


@pytest.mark.parametrize("name", ["README.md", "model.md", f"{this_machine().name}-model.svg"])
def test_a_file_of_others_in_the_place_of_a_page_is_refused_before_anything_is_written(
    name: str, tmp_path: Path
) -> None:
    put(tmp_path, networks())
    (tmp_path / name).write_text("mine", encoding="utf-8")
    for refusing in (report.ready, report.write):
        with pytest.raises(FileExistsError, match=f"{name} was not written by 'maxattn bench': move it"):
            refusing(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {report.RESULTS, name}
    assert (tmp_path / name).read_text("utf-8") == "mine"


def test_tables_of_the_operator_tell_multiples_of_the_floor_and_memory() -> None:
    text = tables.op(operator("float32", "none"))
    for bias in ("float32", "none"):
        assert f"| 8 | 56 | 64 | 7 | grid | {bias} | 100 | 400 ±15% (4.00) |" in text
        assert f"| 8 | 56 | 64 | 7 | grid | {bias} | 300 | 1,200 ±15% (4.00) |" in text
        assert f"| 8 | 56 | 64 | 7 | grid | {bias} | 12 |" in text
    assert "- triton: not able: no support for cpu" in text


@pytest.mark.parametrize("biases", [("float32",), ("none",), ("float32", "none")])
def test_plots_of_the_operator_have_panels_for_each_bias(biases: tuple[str, ...], tmp_path: Path) -> None:
    assert plots.draw(operator(*biases), tmp_path / "op.svg")
    text = (tmp_path / "op.svg").read_text("utf-8")
    for bias in ("float32", "none"):
        assert text.count(f"times the floor, bias {bias}<") == 2 * (bias in biases)


def test_tables_of_scaling_tell_exponents_and_what_is_left_out() -> None:
    text = tables.scaling(scaling())
    assert "| windows | 1 | 1 |" in text
    assert "| full attention | 2 | 1 |" in text
    assert "| 1792 x 1792 | 321 ms ±15% | 3,211 | - | - |" in text
    assert "- attention by sdpa: windows; full attention" in text
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
    for wanting in (report.ready, report.write):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'maxattn\[plot\]'"):
            wanting(tmp_path)


def test_the_pages_of_this_repository_are_what_its_results_say(tmp_path: Path) -> None:
    shutil.copytree(BENCHMARKS / report.RESULTS, tmp_path / report.RESULTS)
    for path in report.write(tmp_path):
        assert (BENCHMARKS / path.name).exists()
        if path.suffix == ".md":
            assert path.read_text("utf-8") == (BENCHMARKS / path.name).read_text("utf-8"), "run: maxattn bench report"
