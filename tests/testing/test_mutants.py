"""The kit fails every backend that has a bug, and passes every one that has none."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from testing.correct import CORRECT
from testing.mutants import MUTANTS

from maxattn.ops.naive import Naive
from maxattn.testing import Report, check_backend
from maxattn.testing.registry import CHECKS
from maxattn.testing.runner import subject_of

EXAMPLES = 10
EXAMPLES_OF_CORRECT = 4
"""Fewer: all checks run on each of them, to their ends, which takes most of these tests' time."""

FOUND_BY = {
    "interface": "takes_whatever_is_given",
    "answers": "raises_when_asked",
    "declared_is_served": "refuses_everything",
    "undeclared_is_refused": "never_unable",
    "forward": "axes_swapped",
    "gradients": "dk_and_dv_swapped",
    "ragged": "zero_padding_as_keys",
    "many_groups": "grid_dilated_by_the_window",
    "narrow": "short_image_gradient_of_v",
    "scale": "scale_argument_ignored",
    "heads": "bias_of_heads_modulo_8",
    "windows": "keys_above_256_ignored",
    "large_windows": "last_partial_tile_skipped",
    "layouts": "qkv_taken_for_contiguous",
    "bias_dtypes": "dbias_halved_with_a_fp32_bias",
    "one_gradient": "no_dbias_if_only_the_bias_needs_one",
    "bias_sum": "dbias_of_at_most_256_windows",
    "values": "no_maximum_subtracted",
    "cancelling_sums": "values_summed_in_half",
    "anything": "no_qkv_gradient_without_a_bias_gradient",
    "independent_calls": "scale_of_the_first_call",
    "own_memory": "gradient_buffer_reused",
    "changed_inputs": "bias_cached_by_address",
    "no_side_effects": "matmul_precision_left_changed",
    "default_dtype": "scale_in_the_default_dtype",
    "isolated": "edge_pixels_with_weight_zero",
    "threads": "problem_kept_on_the_instance",
    "repeatable": "sometimes_without_the_last_group",
    "bitwise": "dbias_summed_in_any_order",
    "second_backward": "saved_copy_scaled_in_place",
    "changed_before_backward": "inputs_saved_unseen",
    "double_backward": "silently_wrong_double_backward",
    "checkpointing": "saved_tensors_unpacked_twice",
    "without_gradient": "gradient_always_prepared",
    "dropout_seed": "seed_fixed",
    "dropout_rate": "dropout_not_scaled",
    "dropout_gradient": "fresh_mask_in_the_backward_pass",
    "empty_batch": "empty_batch_raises",
    "many_windows": "windows_above_65535_dropped",
    "far_apart": "offsets_wrap_around",
    "compiled": "compiled_without_bias",
    "generated": "compiled_without_bias",
    "exported": "exported_as_blocks",
    "operators": "mutation_not_declared",
}
"""For each check a mutant that it finds by itself."""


@pytest.fixture(autouse=True)
def fresh_torch() -> Iterator[None]:
    """Some mutants leave settings changed, and what was compiled for one is of no use to the next."""
    precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    with torch.random.fork_rng():
        yield
    torch.set_float32_matmul_precision(precision)
    torch.set_default_dtype(dtype)
    torch.compiler.reset()


def first_failure(name: str) -> Report:
    """The report on a mutant up to the first check that fails, those that are likely to fail first."""
    mutant, likely = MUTANTS[name]
    report = check_backend(mutant.make(), examples=EXAMPLES, only=likely, fail_fast=True)
    return check_backend(mutant.make(), examples=EXAMPLES, fail_fast=True) if report.passed else report


@pytest.mark.parametrize("name", MUTANTS)
def test_a_backend_with_a_bug_fails(name: str, record_property: Callable[[str, object], None]) -> None:
    report, bug = first_failure(name), MUTANTS[name][0].bug
    found = [(outcome.name, outcome.failure.splitlines()[0][:100]) for outcome in report.failed]
    record_property("mutant", [name, bug, *(found[0] if found else ("-", "it lives"))])
    assert not report.passed, f"{name} lives: {bug}"
    assert found, str(report)


@pytest.mark.parametrize("name", CORRECT)
def test_a_backend_without_a_bug_passes(name: str) -> None:
    report = check_backend(CORRECT[name], examples=EXAMPLES_OF_CORRECT)
    assert report.passed, f"\n{report}"


def test_every_check_that_a_cpu_allows_has_a_bug_to_find() -> None:
    subject = subject_of(Naive(), "cpu", EXAMPLES, seed=0)
    found = {name for name, check in CHECKS.items() if check.not_applicable(subject) != "only on cuda"}
    assert set(FOUND_BY) == found - {"autocast"}, "which `max_sa` itself switches off around the call"


@pytest.mark.parametrize("check", FOUND_BY)
def test_a_check_finds_a_bug_by_itself(check: str) -> None:
    mutant, _ = MUTANTS[FOUND_BY[check]]
    report = check_backend(mutant.make(), examples=EXAMPLES, only=[check])
    assert report.failed, f"{check} does not find {mutant.name}: {mutant.bug}\n{report}"
