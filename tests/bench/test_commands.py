"""`maxattn bench` on the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner
from typer.testing import Result as Run

from maxattn.bench import Result, this_machine
from maxattn.cli import app
from maxattn.ops.contract import Problem
from maxattn.ops.naive import Naive
from maxattn.ops.registry import registered

OP = ["op", "--size", "6x4", "--width", "32", "--window", "3", "--batch", "1", "--backend", "naive", "--quick"]
SCALING = ["scaling", "nano", "--size", "28", "--size", "56", "--quick"]


def run(*arguments: str, exit_code: int = 0) -> Run:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == exit_code, (result.output, result.exception)
    return result


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        pytest.param(OP, "| 1 | 6x4 | 32 | 3 | block |", id="op"),
        pytest.param(["model", "nano", "--quick"], "| maxattn optimized, eager |", id="model"),
        pytest.param(["train", "nano", "--quick"], "| maxattn, eager |", id="train"),
        pytest.param(SCALING, "| 56 x 56 |", id="scaling"),
        pytest.param(["dispatch"], "| MAXATTN_BACKEND |", id="dispatch"),
    ],
)
def test_every_measurement_prints_and_keeps_its_result(arguments: list[str], told: str, tmp_path: Path) -> None:
    text = run(*arguments, "--out", str(tmp_path))
    assert told in text.stdout
    assert this_machine().cpu in text.stdout
    kept = tmp_path / "results" / f"{this_machine().name}-{arguments[0]}.json"
    assert f"wrote {kept}" in text.stderr
    assert told in (tmp_path / f"{arguments[0]}.md").read_text("utf-8")
    result = json.loads(kept.read_text("utf-8"))
    assert result["machine"]["torch"] == torch.__version__
    assert result["finished"]


def test_json_is_what_is_kept(tmp_path: Path) -> None:
    printed = json.loads(run(*OP, "--json", "--out", str(tmp_path)).stdout)
    (kept,) = (tmp_path / "results").iterdir()
    assert printed == json.loads(kept.read_text("utf-8"))


class Interrupted(Naive):
    """Its user has enough when it comes to the grid."""

    name = "interrupted"

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        if problem.axis == "grid":
            raise KeyboardInterrupt
        return super().attend(qkv, bias, problem)


def test_what_was_measured_before_an_interruption_is_kept_and_told(tmp_path: Path) -> None:
    older = Result(kind="op", machine=this_machine()).write(tmp_path / "results")
    finished = older.read_bytes()
    with registered(Interrupted()):
        result = run(*OP, "--backend", "interrupted", "--out", str(tmp_path), exit_code=130)
    kept = tmp_path / "results" / f"{this_machine().name}-op-unfinished.json"
    rows = json.loads(kept.read_text("utf-8"))["rows"]
    assert {(row["case"]["axis"], row["case"]["pass"]) for row in rows} == {("block", "forward"), ("block", "training")}
    assert {row["candidate"] for row in rows if row["time"]} == {"floor", "copy", "naive", "interrupted"}
    assert f"wrote {kept}" in result.stderr
    assert "Not finished" in result.stderr
    assert "| 1 | 6x4 | 32 | 3 | block |" in result.stdout
    assert ", not finished" in (tmp_path / "op.md").read_text("utf-8")
    assert older.read_bytes() == finished


@pytest.mark.parametrize("name", ["README.md", "op.md", "train.md"])
def test_a_folder_with_a_page_of_others_is_refused_before_anything_is_measured(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine", encoding="utf-8")
    result = run(*OP, "--out", str(tmp_path), exit_code=2)
    assert f"{tmp_path / name} was not written by 'maxattn bench'" in result.stderr
    assert result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text("utf-8") == "mine"


def test_without_matplotlib_nothing_is_measured_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'maxattn[plot]'" in run(*OP, "--out", str(tmp_path), exit_code=2).stderr
    assert list(tmp_path.iterdir()) == []


def test_report_writes_the_pages_anew(tmp_path: Path) -> None:
    run(*OP, "--out", str(tmp_path))
    page = tmp_path / "op.md"
    before = page.read_text("utf-8")
    page.write_text(before + "edited by hand", encoding="utf-8")
    assert f"wrote {page}" in run("report", str(tmp_path)).stdout
    assert page.read_text("utf-8") == before


def test_report_without_results_says_how_to_get_some(tmp_path: Path) -> None:
    assert f"maxattn bench model --out {tmp_path}" in run("report", str(tmp_path)).stdout
    assert list(tmp_path.iterdir()) == []


def test_only_what_is_asked_for_is_measured() -> None:
    asked = ["--axis", "grid", "--pass", "forward", "--no-bias", "--dtype", "bf16"]
    rows = json.loads(run(*OP, *asked, "--json").stdout)["rows"]
    assert {tuple(row["case"][name] for name in ("axis", "pass", "bias", "dtype")) for row in rows} == {
        ("grid", "forward", "none", "bfloat16")
    }
    assert [row["candidate"] for row in rows] == ["floor", "copy", "naive"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["model", "nanno"], "did you mean nano"),
        (["train", "nano", "--dtype", "int8"], "'int8' is no dtype"),
        (["model", "nano", "--device", "xla"], "there is no xla here, only cpu"),
        (["model", "nano", "--img-size", "7x"], "'7x' is no size"),
        (["op", "--size", "8", "--width", "20", "--quick"], "width 20 is no multiple of 32"),
        (["scaling", "nano", "--size", "56", "--size", "28"], "sizes must be increasing, not 56, 28"),
    ],
)
def test_bad_input_is_told_with_what_would_work(arguments: list[str], told: str) -> None:
    result = run(*arguments, exit_code=2)
    assert told in " ".join(result.stderr.replace("\u2502", " ").split())
    assert result.stdout == ""


def test_a_file_that_is_no_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "other.json").write_text("[]", encoding="utf-8")
    result = run("report", str(tmp_path), exit_code=2)
    assert "other.json holds no result of 'maxattn bench'" in result.stderr
