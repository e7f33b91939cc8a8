"""Measurements: of the operator, of networks and of the choice of a backend; with a stamp of the machine.

`op`, `model`, `train`, `scaling` and `dispatch` each measure one thing and return a `Result`, which is kept as JSON;
`report` writes tables and plots from any number of those.
"""

from maxattn.bench.machine import Machine, cpu_model, device_types, this_machine
from maxattn.bench.results import Result, Row, Time

__all__ = ["Machine", "Result", "Row", "Time", "cpu_model", "device_types", "this_machine"]
