"""The operator under PyTorch's FSDP, in processes of their own."""

from __future__ import annotations

from pathlib import Path

from fresh_python import python


def test_sharded_parameters_get_the_gradients_of_one_process(tmp_path: Path) -> None:
    script = Path(__file__).with_name("sharded_training.py")
    python(arguments=(str(script), str(tmp_path / "rendezvous")))
