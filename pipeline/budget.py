"""The error budget: how many error rows a run puts up with before it stops."""

from __future__ import annotations

from dataclasses import dataclass

FEWEST = 100  # a share of fewer samples says little


@dataclass
class ErrorBudget:
    """Counts samples as they arrive; both limits are off where they are None."""

    max_errors: int | None = None
    max_error_rate: float | None = None
    samples: int = 0  # error rows included
    errors: int = 0

    def spend(self, samples: int, errors: int) -> str | None:
        """Count these; where that is too much, the sentence that says so."""
        self.samples += samples
        self.errors += errors
        found = f"{self.errors} of {self.samples} samples so far are error rows"
        if self.max_errors is not None and self.errors > self.max_errors:
            return f"{found}, more than input.max_errors={self.max_errors}"
        if self.max_error_rate is not None and self.errors > self.max_error_rate * max(self.samples, FEWEST):
            return f"{found} ({self.errors / self.samples:.1%}), more than input.max_error_rate={self.max_error_rate}"
        return None
