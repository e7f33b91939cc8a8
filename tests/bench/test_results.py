"""Results survive their files, and the stamp says all that a time depends on and nothing of where files lie."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import torch

import maxattn
from maxattn.bench import Result, Row, Time, this_machine

ROWS = (
    Row(
        case={"network": "nano", "batch": 1},
        candidate="maxattn plain, eager",
        library="maxattn",
        mode="eager",
        time=Time(median=0.25, low=0.2, high=0.5, samples=5),
        first_call=1.5,
        mib=3.25,
    ),
    Row(case={"network": "nano", "batch": 1}, candidate="timm", library="timm", note="not installed: pip install timm"),
)


def result() -> Result:
    return Result(kind="model", machine=this_machine(), settings={"rounds": 3, "share": 0.5}, rows=ROWS)


def test_a_result_is_the_same_after_it_was_written_and_read(tmp_path: Path) -> None:
    path = result().write(tmp_path / "new" / "folder")
    seen = Result.read(path)
    assert seen == replace(result(), machine=seen.machine)
    assert json.loads(path.read_text("utf-8")) == seen.to_dict()


def test_a_result_replaces_only_the_one_of_the_same_machine_and_kind(tmp_path: Path) -> None:
    ours = result()
    theirs = replace(ours, machine=replace(ours.machine, device="cuda", gpu="NVIDIA H200"))
    for one in (ours, theirs, replace(ours, kind="train"), replace(ours, rows=ROWS[:1])):
        one.write(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert (tmp_path / "nvidia-h200-model.json").exists()
    assert Result.read(tmp_path / ours.file_name).rows == ROWS[:1]


def test_an_unfinished_result_leaves_the_older_one_until_it_is_finished(tmp_path: Path) -> None:
    older, newer = result(), replace(result(), rows=ROWS[:1])
    path = older.write(tmp_path)
    begun = replace(newer, finished=False).write(tmp_path)
    assert Result.read(path).rows == older.rows
    assert not Result.read(begun).finished
    assert newer.write(tmp_path) == path
    assert Result.read(path).rows == newer.rows
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "told"),
    [("{", "EOF"), ("{}", "kind"), ('{"kind": "speed"}', "'op', 'model', 'train', 'scaling' or 'dispatch'")],
)
def test_a_file_without_a_result_is_named_with_what_is_wrong(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="holds no result of 'maxattn bench'") as raised:
        Result.read(path)
    assert str(path) in str(raised.value)
    assert told in str(raised.value)


class TestStamp:
    def test_tells_the_machine_its_threads_versions_and_the_time(self) -> None:
        stamp = this_machine()
        assert stamp.cpu
        assert stamp.gpu is None
        assert 1 <= stamp.cores <= (os.cpu_count() or 1)
        assert stamp.threads == torch.get_num_threads()
        assert (stamp.python, stamp.torch) == (platform.python_version(), torch.__version__)
        assert stamp.maxattn == maxattn.__version__
        assert datetime.fromisoformat(stamp.date).tzinfo is not None
        for told in (stamp.cpu, stamp.torch, stamp.date):
            assert told in str(stamp)

    def test_notes_settings_that_change_times(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "4294967295")
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        monkeypatch.setenv("LD_PRELOAD", "/opt/lib/libjemalloc.so.2")
        stamp = this_machine()
        assert stamp.environment["MALLOC_MMAP_THRESHOLD_"] == "4294967295"
        assert stamp.environment["OMP_NUM_THREADS"] == "2"
        assert stamp.environment["LD_PRELOAD"] == "jemalloc"
        assert "MALLOC_MMAP_THRESHOLD_=4294967295" in str(stamp)

    def test_notes_no_paths_and_nothing_unrelated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_HOME", "cuda")
        monkeypatch.setenv("TORCH_EXTENSIONS", "/home/somebody/cache")
        monkeypatch.setenv("SECRET_TOKEN", "1234")
        told = json.dumps(this_machine().environment)
        assert not any(word in told for word in ("CUDA_HOME", "somebody", "1234"))

    def test_machines_have_different_names_for_files(self) -> None:
        stamp = this_machine()
        names = {
            stamp.name,
            replace(stamp, cores=stamp.cores + 1).name,
            replace(stamp, gpu="NVIDIA H200").name,
            replace(stamp, gpu="NVIDIA GeForce RTX 4090").name,
        }
        assert len(names) == 4
        assert (
            replace(stamp, cpu="Intel(R) Xeon(R) CPU E5-2690 @ 2.60GHz", cores=4).name == "intel-xeon-e5-2690-4-cores"
        )
