"""Following a schedule that was drawn before the run: its batches one after the other, each once, for good.

what happens                                       what privet does
another run, or a resumed one, opens the schedule  it goes on after the last batch that was handed over
two runs follow it at once                         the second is refused at its first batch
a batch that was handed over before is wanted      refused: its coins were told of once
a file was changed, or is of another schedule      refused where it is read
others than the owner may read a file              refused
another law, rate, size or number of steps         refused when the loader is made
the folder was copied, and both are used           not seen: never do it
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn
from weakref import WeakValueDictionary, finalize

import numpy as np
import numpy.typing as npt

from privet.accounting.event import Event
from privet.errors import ConfigurationError, ProtocolError
from privet.noise.keystream import Keystream
from privet.sampling.base import Sampling
from privet.sampling.offline import HEADER, SALT_BYTES, USED, Laws, chunk_name, law_of

__all__ = ["DrawnSchedule"]


@dataclass(frozen=True)
class DrawnSchedule(Sampling):
    """The batches of a schedule that `draw_schedule` or `privet schedule` has drawn, billed by the law they follow.

    Open it with `DrawnSchedule.open`. Who is in which batch is secret, and stays in the files. What is here is public:
    the digest tells this schedule from any other, also of the same law, in loaders' states and between ranks.

    Attributes:
        law: how the batches were drawn.
        dataset_size: the number of records.
        passes: how many passes were drawn.
        steps_of_a_pass: the number of batches in each.
        digest: of all files, salted.
    """

    law: Laws
    dataset_size: int
    passes: int
    steps_of_a_pass: int
    digest: str
    files: _Files = field(compare=False, repr=False)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> DrawnSchedule:
        """Returns the schedule in a folder, to be followed from the first batch that no run was given yet.

        Raises:
            ConfigurationError: if there is none, it is damaged, or others may read it.
        """
        files = _opened(Path(folder))
        header = files.header
        return cls(
            law=law_of(header["law"]),
            dataset_size=header["dataset_size"],
            passes=header["passes"],
            steps_of_a_pass=header["steps_per_pass"],
            digest=files.digest,
            files=files,
        )

    @property
    def steps(self) -> int:
        """Returns the number of all batches."""
        return self.passes * self.steps_of_a_pass

    @property
    def used(self) -> int:
        """Returns how many batches were handed over, or can never be since a later one was."""
        return self.files.used()

    @property
    def billed_per(self) -> Literal["step", "pass"]:
        """Returns what the law is billed by."""
        return self.law.billed_per

    def event_for(self, base_event: Event, count: int = 1) -> Event:
        """Returns the event of `count` steps, or passes, of the law.

        Raises:
            ConfigurationError: if the schedule has fewer.
        """
        most = self.steps if self.billed_per == "step" else self.passes
        if count > most:
            raise ConfigurationError(
                f"{count} {self.billed_per}(s) are planned, and the schedule has {most}. Expected no more. Draw a "
                "longer schedule before the run, or plan for this one."
            )
        return self.law.event_for(base_event, count)

    def shared(self, words: Keystream, *, size: int, number: int) -> None:
        """Returns None: all was drawn before."""

    def draw(self, words: Keystream, *, size: int, number: int, index: int, shared: None) -> list[int]:
        """Returns the records of one batch.

        Raises:
            ProtocolError: if all batches were handed over.
        """
        self.steps_per_pass(size)
        if (place := self._place(number, index)) >= self.steps:
            raise ProtocolError(
                f"the schedule has {self.steps} batches, and all were handed over. Expected no further one: a batch "
                "that comes again tells of the same coins. Nothing was released. Draw a new schedule, with a new key."
            )
        return self.files.batch(place).tolist()  # type: ignore[no-any-return]

    def steps_per_pass(self, size: int) -> int:
        """Returns the number of batches in a pass.

        Raises:
            ConfigurationError: if the schedule is for another number of records.
        """
        if size != self.dataset_size:
            raise ConfigurationError(
                f"the schedule was drawn for {self.dataset_size} records, and the data set has {size}. Expected as "
                "many. Draw a schedule for this data set."
            )
        return self.steps_of_a_pass

    def expected_batch_size(self, size: int) -> float:
        """Returns that of the law."""
        return self.law.expected_batch_size(size)

    @property
    def random_size(self) -> bool:
        """Returns True."""
        return True

    @property
    def resumable(self) -> bool:
        """Returns True: what was drawn does not change with the key of a run."""
        return True

    def scaled(self, factor: float) -> NoReturn:
        """Raises ConfigurationError: what was drawn keeps its rate."""
        raise ConfigurationError(
            "a schedule that was drawn before the run keeps its rate. Expected Poisson sampling in the loader. Leave "
            "the rate alone."
        )

    def position(self, steps: int) -> tuple[int, int]:
        """Returns the passes begun, and the batches spent of the last, for a loader with `steps` batches in a pass.

        Raises:
            ConfigurationError: if the loader's passes are not those of the schedule, nor all of it one pass.
        """
        if steps not in {self.steps_of_a_pass, self.steps}:
            raise ConfigurationError(
                f"{steps} steps are planned, and the schedule has {self.steps_of_a_pass} in each of {self.passes} "
                f"passes. Expected {self.steps}: Mechanism(steps={self.steps}, ...). Plan for all of it."
            )
        begun, rest = divmod(self.used, steps)
        return begun + (rest > 0), rest

    def spend(self, number: int, index: int, *, record: bool = True) -> None:
        """Marks a batch and all before it as handed over, on disk where `record` says so.

        Raises:
            ProtocolError: if it was, or another process follows the schedule.
        """
        self.files.spend(self._place(number, index), record=record)

    def _place(self, number: int, index: int) -> int:
        # Where all of it is one pass of the loader, number is 1 and index goes on.
        return (number - 1) * self.steps_of_a_pass + index


class _Files:
    """The files of a schedule: read chunk by chunk, and the mark of how far they are used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        for name in (HEADER, USED):
            if not (self.folder / name).is_file():
                raise ConfigurationError(
                    f"{folder} holds no schedule: there is no file {name}. Expected a folder that `privet schedule` or "
                    "privet.sampling.draw_schedule has made."
                )
        for path in (self.folder, *self.folder.iterdir()):
            if os.name == "posix" and path.stat().st_mode & 0o077:
                raise ConfigurationError(
                    f"{path} can be read by others, and it says who is in which batch. Expected a file of its owner "
                    f"alone. Run: chmod -R go= {self.folder}"
                )
        content = (self.folder / HEADER).read_bytes()
        self.header: dict[str, Any] = json.loads(content)
        if self.header.get("format") != 1:
            raise ConfigurationError(f"{folder} has format {self.header.get('format')}, and this version reads 1.")
        self.digest = sha256(content).hexdigest()[:32]  # the header has the digests of the chunks
        self._firsts = np.asarray([chunk["first"] for chunk in self.header["chunks"]])
        self._kept: tuple[int, npt.NDArray[np.int64], npt.NDArray[Any]] | None = None
        self._used: int | None = None
        self._mark: BinaryIO | None = None  # the file of the mark, which this process holds locked

    def batch(self, place: int) -> npt.NDArray[Any]:
        """Returns the records of a batch, ascending: shape (m,)."""
        number = int(np.searchsorted(self._firsts, place, side="right")) - 1
        if self._kept is None or self._kept[0] != number:
            self._kept = number, *self._chunk(number)
        _, ends, records = self._kept
        index = place - int(self._firsts[number])
        return np.sort(records[ends[index - 1] if index else 0 : ends[index]])

    def used(self) -> int:
        """Returns the first batch that was not handed over, as this process knows it."""
        # Read once: of several ranks one writes the mark, while the others begin.
        if self._used is None:
            self._used = int.from_bytes((self.folder / USED).read_bytes(), "little")
        return self._used

    def look_again(self) -> None:
        """Forgets how far the schedule was used, unless it is this process that uses it."""
        if self._mark is None:
            self._used = None

    def spend(self, place: int, *, record: bool) -> None:
        """Marks a batch, and all before it, as handed over."""
        used = self.used()
        if record and self._mark is None:
            self._mark = _locked(self.folder / USED)
            finalize(self, self._mark.close)
            found = int.from_bytes(os.pread(self._mark.fileno(), 8, 0), "little")
            used = self._used = max(used, found)
        if place < used:
            raise ProtocolError(
                f"batch {place} of the schedule was handed over before, and {used} were. Expected the next one: who is "
                "in a batch is drawn once, and the accounting does not cover a second use. Make a new loader, which "
                "goes on after the last batch, or draw a new schedule."
            )
        if self._mark is not None:
            os.pwrite(self._mark.fileno(), (place + 1).to_bytes(8, "little"), 0)
            os.fsync(self._mark.fileno())
        self._used = place + 1

    def _chunk(self, number: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
        """Returns where each batch of a chunk ends, and their records."""
        chunk = self.header["chunks"][number]
        path = self.folder / chunk_name(number)
        content = path.read_bytes() if path.is_file() else b""
        if sha256(content).hexdigest() != chunk["sha256"]:
            raise ConfigurationError(
                f"{path} is not as it was drawn. Expected the file of this schedule, unchanged. Draw a new schedule."
            )
        counts = np.frombuffer(content, dtype="<u8", offset=SALT_BYTES, count=chunk["steps"]).astype(np.int64)
        kind = "<u4" if self.header["dataset_size"] <= 2**32 else "<u8"
        return np.cumsum(counts), np.frombuffer(content, dtype=kind, offset=SALT_BYTES + 8 * len(counts))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Files:
        return self  # one schedule, whatever describes it

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (self.folder,)


_OPENED: WeakValueDictionary[tuple[Path, str], _Files] = WeakValueDictionary()


def _opened(folder: Path) -> _Files:
    """Returns the files of a schedule: in this process the same object each time, with the one lock on the mark."""
    files = _Files(folder)
    known = _OPENED.setdefault((files.folder, files.digest), files)
    known.look_again()
    return known


def _locked(path: Path) -> BinaryIO:
    """Returns a file that no other process has open like this."""
    mark = path.open("r+b", buffering=0)
    try:
        import fcntl

        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # not on Windows, where the mark alone keeps two runs apart
        pass
    except OSError as error:
        mark.close()
        raise ProtocolError(
            f"another process follows the schedule in {path.parent}. Expected one at a time: both would be given the "
            "same batches. End it, or draw a schedule for each."
        ) from error
    return mark
