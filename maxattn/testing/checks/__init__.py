"""All checks, in the order they run in: each module registers its own."""

# isort: off
import maxattn.testing.checks.contract
import maxattn.testing.checks.results
import maxattn.testing.checks.state
import maxattn.testing.checks.autograd
import maxattn.testing.checks.dropout
import maxattn.testing.checks.extremes
import maxattn.testing.checks.windows
import maxattn.testing.checks.compiled
import maxattn.testing.checks.gpu  # noqa: F401
