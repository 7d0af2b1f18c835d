"""Loggers of a step's statistics: to a CSV file, and to TensorBoard. What they write is not private."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from privet.errors import ConfigurationError
from privet.training.statistics import StepStatistics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["CSVLogger", "TensorBoardLogger"]


def _named(found: StepStatistics) -> dict[str, float]:
    """Returns the numbers by their names in a log."""
    norms = {f"norm_{level:g}": norm for level, norm in found.norms.items()}
    return {
        "examples": found.examples,
        "dropped": found.dropped,
        "clipped": found.clipped,
        "clip_norm": found.clip_norm,
        **norms,
    }


@final
class CSVLogger:
    """Appends a line for each logical step to a CSV file. The file is NOT PRIVATE: keep it where the data are.

    Args:
        path: of the file. One that exists is gone on with if it has the same columns.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)

    def __call__(self, found: StepStatistics) -> None:
        """Writes the line of one step.

        Raises:
            ConfigurationError: if the file has other columns.
        """
        row = {"step": found.step, "model": found.model, **_named(found)}
        header = next(csv.reader([self._first_line()]), [])
        if header not in ([], list(row)):
            raise ConfigurationError(
                f"{self._path} has the columns {', '.join(header)}, and this run writes {', '.join(row)}. Expected "
                "the same ones. Give another path, or the quantiles of the run before."
            )
        with self._path.open("a", newline="", encoding="utf-8") as opened:
            writer = csv.writer(opened)
            if not header:
                writer.writerow(row)
            writer.writerow(row.values())

    def _first_line(self) -> str:
        if not self._path.exists():
            return ""
        with self._path.open(encoding="utf-8", newline="") as opened:
            return opened.readline().rstrip("\r\n")


@final
class TensorBoardLogger:
    """Writes each number of a logical step as a scalar. The log is NOT PRIVATE: keep it where the data are.

    Args:
        log_dir: the folder of the log; or a `SummaryWriter` of your own.
        prefix: what the names of the scalars begin with. A second model of one engine has its number after it.
    """

    def __init__(self, log_dir: str | os.PathLike[str] | SummaryWriter, *, prefix: str = "privet") -> None:
        self._writer: Any = log_dir
        self._prefix = prefix
        if isinstance(log_dir, str | os.PathLike):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ConfigurationError(
                    "TensorBoardLogger needs the package tensorboard, which is not installed. Expected it beside "
                    "torch. Run: pip install tensorboard"
                ) from error
            self._writer = SummaryWriter(os.fspath(log_dir))

    def __call__(self, found: StepStatistics) -> None:
        """Writes the numbers of one step."""
        prefix = f"{self._prefix}/{found.model}" if found.model else self._prefix
        for name, value in _named(found).items():
            self._writer.add_scalar(f"{prefix}/{name}", value, found.step)

    def close(self) -> None:
        """Ends the log."""
        self._writer.close()
