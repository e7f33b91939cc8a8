"""Backends that are `naive`, or another that is right, with one bug each: a file for what the bug is about."""

from __future__ import annotations

from testing.mutants import (
    autograd,
    bias,
    bias_gradients,
    claims,
    dropout,
    exporting,
    gradients,
    layouts,
    maps,
    outputs,
    precision,
    ragged,
    scale,
    shapes,
    state,
    tracing,
)
from testing.mutants.base import Mutant

THEMES = {
    bias: ("forward", "heads", "narrow", "windows", "values"),
    scale: ("forward", "scale", "values"),
    maps: ("forward", "ragged", "narrow"),
    ragged: ("ragged", "narrow", "windows", "values", "isolated", "anything"),
    layouts: ("layouts", "far_apart"),
    shapes: ("forward", "heads", "windows", "many_windows", "empty_batch"),
    precision: ("forward", "gradients", "values", "cancelling_sums"),
    outputs: ("isolated", "forward", "ragged", "own_memory", "layouts", "threads"),
    gradients: ("gradients", "autocast", "scale", "one_gradient", "anything"),
    bias_gradients: ("gradients", "heads", "one_gradient", "bias_sum", "values"),
    autograd: (
        "own_memory",
        "second_backward",
        "changed_before_backward",
        "checkpointing",
        "double_backward",
        "without_gradient",
    ),
    dropout: ("dropout_seed", "dropout_rate", "dropout_gradient"),
    state: (
        "independent_calls",
        "changed_inputs",
        "no_side_effects",
        "default_dtype",
        "own_memory",
        "threads",
        "repeatable",
        "bitwise",
        "without_gradient",
        "dropout_rate",
    ),
    exporting: ("exported",),
    tracing: ("compiled", "operators"),
    claims: ("interface", "answers", "undeclared_is_refused", "gradients", "heads", "double_backward", "anything"),
}
"""The files, and the checks that are tried first for the bugs in each, because the others take longer to find them."""

MUTANTS = {
    one.name: (one, ("declared_is_served", *first))
    for module, first in THEMES.items()
    for one in vars(module).values()
    if isinstance(one, Mutant)
}
"""Every mutant by name, with the checks to try first."""
