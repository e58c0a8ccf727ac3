"""The error budget: how many error rows a run puts up with before it stops."""

from __future__ import annotations

from dataclasses import dataclass

FEWEST = 100  # a share of fewer samples says little, while there are more to come


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
        if self.max_errors is not None and self.errors > self.max_errors:
            return f"{self._found()}, more than input.max_errors={self.max_errors}"
        return self._excess(max(self.samples, FEWEST))

    def conclude(self) -> str | None:
        """The same, once there is no sample to come."""
        return self._excess(self.samples)

    def _excess(self, samples: int) -> str | None:
        if self.max_error_rate is None or self.errors <= self.max_error_rate * samples:
            return None
        share = f"{self.errors / self.samples:.1%}"
        return f"{self._found()} ({share}), more than input.max_error_rate={self.max_error_rate}"

    def _found(self) -> str:
        return f"{self.errors} of {self.samples} samples so far are error rows"
