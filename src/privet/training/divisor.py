"""The public number that a noisy sum is divided by: the expected batch size, which has its home in the sampling."""

from __future__ import annotations

from privet._checks import check_positive
from privet.errors import ConfigurationError
from privet.sampling.base import Sampling

__all__ = ["Divisor"]


class Divisor:
    """The expected batch size of a mean loss, or a constant.

    Args:
        value: the number, or None if it follows from a dataset that is not known yet.
        sampling: the sampling whose expected batch size it is. None for a constant, as for the sum of losses.

    The number is never the size of a batch that was drawn: that is secret where it is random.
    """

    def __init__(self, value: float | None, *, sampling: Sampling | None) -> None:
        self.value = None if value is None else check_positive("expected_batch_size", value)
        self._sampling = sampling

    def learn(self, dataset_size: int) -> None:
        """Derives the number from the public size of a dataset, or checks the number that was given against it.

        Raises:
            ConfigurationError: if the two differ by more than half an example and by more than one part in a hundred,
                which no rounding of a batch size or a rate explains.
        """
        if self._sampling is None:
            return
        expected = self._sampling.expected_batch_size(dataset_size)
        if self.value is None:
            self.value = check_positive("the expected batch size", expected)
        elif abs(self.value - expected) > max(0.5, 0.01 * expected):
            raise ConfigurationError(
                f"expected_batch_size is {self.value:g}, and {self._sampling} draws {expected:g} of {dataset_size} "
                "examples on average. Expected the same number: it has one home, the sampling. Leave "
                "expected_batch_size away, or change the sampling."
            )

    def under(self, sampling: Sampling) -> float:
        """Returns the number for a batch that was drawn under `sampling`, where a schedule changes the rate.

        Raises:
            ConfigurationError: if the number is not known.
        """
        if self.value is None:
            raise ConfigurationError(
                "the expected batch size is not known, and the noisy sum is divided by it. Expected batches of "
                "step.batches(dataset), from which it follows. Give expected_batch_size= for batches of your own."
            )
        first = self._sampling
        if first is None or sampling == first or not (first.random_size and sampling.random_size):
            return self.value
        return self.value * sampling.expected_batch_size(1) / first.expected_batch_size(1)
