"""Drawing of a schedule before the run: who is in which batch, for data of up to some 10^9 records, into files.

Membership is a function of (key, pass, record): record r is in block r // `BLOCK`, and each block has words of its own,
so that any machine that holds the key finds the steps of its records by reading them in order (`memberships`).

    Poisson              the cells (record, step) of a block are one row, through which geometric gaps are drawn
    truncated Poisson    the same; of a batch above the cap, a random choice is kept when batches are put together
    random allocation    the interval of a record's word among as many equal intervals as there are steps

Memory holds one chunk of a pass, whatever the size of the data: memberships go to a file for each chunk first, and each
is then ordered by step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from privet._checks import check_count
from privet.errors import ConfigurationError
from privet.noise.key import KEY_BYTES, NoiseKey
from privet.noise.keystream import Keystream
from privet.sampling.allocation import RandomAllocation
from privet.sampling.base import Sampling
from privet.sampling.draw import address, chosen_indices, intervals, poisson_indices
from privet.sampling.poisson import Poisson
from privet.sampling.truncated import TruncatedPoisson

__all__ = [
    "BLOCK",
    "HEADER",
    "SALT_BYTES",
    "USED",
    "Laws",
    "Memberships",
    "chunk_name",
    "draw_schedule",
    "fresh_key",
    "law_of",
    "memberships",
]

BLOCK = 2**18
"""Records that share words. Another number would be another schedule under the same key."""
HEADER, USED = "schedule.json", "used"
SALT_BYTES = 32
_FORMAT = 1
_BLOCKS_AT_ONCE = 8
_MEMBERSHIPS = 2**22  # in a chunk, about
_MOST_FILES = 256  # of a pass, unless it has more than 2**24 steps
_MOST_STEPS_OF_A_CHUNK = 2**16
_PAIR = np.dtype([("step", "<u2"), ("record", "<u8")])

Laws = Poisson | TruncatedPoisson | RandomAllocation
_LAWS: dict[str, type[Laws]] = {law.__name__: law for law in (Poisson, TruncatedPoisson, RandomAllocation)}


def draw_schedule(
    folder: str | os.PathLike[str],
    law: Laws,
    *,
    dataset_size: int,
    passes: int = 1,
    key: bytes | None = None,
    progress: Callable[[float], None] | None = None,
) -> Path:
    """Draws a schedule into a new folder, and returns its path. Its files are SECRET: they say who is in which batch.

    The folder and its files can be read by their owner alone. Nothing is left behind if drawing is interrupted.

    Args:
        folder: to be made; it must not exist.
        law: how batches are formed.
        dataset_size: the number of records.
        passes: how many passes are drawn. A pass of Poisson sampling has ceil(1 / rate) batches.
        key: 32 secret bytes, where other machines are to find the steps of their own records (`memberships`). By
            default they are drawn and forgotten. One key is for one schedule: a second one would draw the same again.
        progress: called with the part that is done, from 0 to 1.

    Raises:
        ConfigurationError: if the folder exists, or the law is none that can be drawn beforehand.
    """
    target = Path(folder)
    if target.exists():
        raise ConfigurationError(f"{target} exists. Expected a new folder: a schedule is drawn once, and used once.")
    steps = _checked(law, check_count("dataset_size", dataset_size, 1))
    check_count("passes", passes, 1)
    stream = _stream(fresh_key() if key is None else key)
    drawing = target.with_name(f"{target.name}.{os.getpid()}.drawing")
    drawing.mkdir(mode=0o700, parents=True)
    try:
        chunks: list[dict[str, Any]] = []
        for number in range(1, passes + 1):
            done = (number - 1) / passes
            report = None if progress is None else (lambda part, done=done: progress(done + part / passes))
            chunks += _Pass(drawing, law, dataset_size, stream=stream, number=number).draw(report)
        header: dict[str, Any] = {
            "format": _FORMAT,
            "law": {"name": type(law).__name__, **vars(law)},
            "dataset_size": dataset_size,
            "passes": passes,
            "steps_per_pass": steps,
            "chunks": chunks,
        }
        _write(drawing / HEADER, json.dumps(header, indent=1).encode())
        _write(drawing / USED, (0).to_bytes(8, "little"))
        drawing.rename(target)
    except BaseException:
        shutil.rmtree(drawing, ignore_errors=True)
        raise
    return target


class Memberships(NamedTuple):
    """Which records are in which steps of a pass: pair i is `records[i]` in step `steps[i]`, ascending by record."""

    records: npt.NDArray[np.int64]  # (m,)
    steps: npt.NDArray[np.int64]  # (m,)


def memberships(key: bytes, law: Laws, *, dataset_size: int, number: int, block: int) -> Memberships:
    """Returns the steps of the records of a block (from `block` x `BLOCK` on) in pass `number`, which counts from 1.

    They are those of `draw_schedule` under the same key, but for what a cap cuts afterwards. SECRET.
    """
    _checked(law, dataset_size)
    return _memberships(_stream(key), law, dataset_size, number=number, block=block)


def fresh_key() -> bytes:
    """Returns a key for one schedule, which the operating system has just drawn."""
    return os.urandom(KEY_BYTES)


def law_of(described: dict[str, Any]) -> Laws:
    """Returns the law that the header of a schedule describes."""
    values = dict(described)
    return _LAWS[values.pop("name")](**values)


def chunk_name(number: int) -> str:
    """Returns the name of the file of a chunk."""
    return f"chunk-{number:06d}"


def _checked(law: Sampling, size: int) -> int:
    """Returns the steps of a pass."""
    if type(law) not in _LAWS.values():
        raise ConfigurationError(
            f"{law} is not drawn beforehand. Expected one of {', '.join(_LAWS)}, whose draws do not depend on the run."
        )
    return law.steps_per_pass(size)


def _stream(key: bytes) -> Keystream:
    if len(key) != KEY_BYTES:
        raise ConfigurationError(f"the key of a schedule has {KEY_BYTES} bytes, got {len(key)}.")
    return Keystream(NoiseKey.from_secret(key), purpose="schedule")


def _memberships(stream: Keystream, law: Laws, size: int, *, number: int, block: int) -> Memberships:
    steps = law.steps_per_pass(size)
    first = block * BLOCK
    held, step = min(BLOCK, size - first), address(number, block)
    if isinstance(law, RandomAllocation):
        return Memberships(
            np.arange(first, first + held), intervals(stream.words(held, step=step, name="allocation"), steps)
        )
    cells = poisson_indices(stream, rate=law.rate, size=held * steps, step=step, name="poisson")
    records, chosen = np.divmod(cells, steps)
    return Memberships(first + records, chosen)


class _Pass:
    """The drawing of one pass into chunks of consecutive steps."""

    def __init__(self, folder: Path, law: Laws, size: int, *, stream: Keystream, number: int) -> None:
        steps = law.steps_per_pass(size)
        self._folder, self._law, self._size, self._steps = folder, law, size, steps
        self._stream, self._number = stream, number
        expected = max(1.0, law.expected_batch_size(size))
        of_a_chunk = max(_MEMBERSHIPS, expected * steps / _MOST_FILES)
        self._chunk = max(1, min(_MOST_STEPS_OF_A_CHUNK, int(of_a_chunk / expected)))
        self._count = -(-steps // self._chunk)

    def draw(self, report: Callable[[float], None] | None) -> list[dict[str, Any]]:
        """Writes the chunks of the pass, and returns what the header says of them."""
        blocks = -(-self._size // BLOCK)
        parts = [self._folder / f"part-{each}" for each in range(self._count)]
        for path in parts:
            _write(path, b"")
        for first in range(0, blocks, _BLOCKS_AT_ONCE):
            last = min(first + _BLOCKS_AT_ONCE, blocks)
            self._deal(parts, range(first, last))
            if report is not None:
                report(0.6 * last / blocks)
        found = []
        for each, path in enumerate(parts):
            found.append(self._grouped(path, each))
            path.unlink()
            if report is not None:
                report(0.6 + 0.4 * (each + 1) / self._count)
        return found

    def _deal(self, parts: list[Path], blocks: range) -> None:
        """Appends the memberships of some blocks to the files of their chunks."""
        each = [_memberships(self._stream, self._law, self._size, number=self._number, block=block) for block in blocks]
        drawn = Memberships(*(np.concatenate(arrays) for arrays in zip(*each, strict=True)))
        chunks = drawn.steps // self._chunk
        order = np.argsort(chunks.astype(np.uint16), kind="stable")  # a radix sort
        pairs = np.empty(len(order), dtype=_PAIR)
        pairs["step"], pairs["record"] = (drawn.steps % self._chunk)[order], drawn.records[order]
        ends = np.cumsum(np.bincount(chunks, minlength=self._count))
        for path, start, end in zip(parts, [0, *ends[:-1]], ends, strict=True):
            if end > start:
                with path.open("ab") as file:
                    file.write(pairs[start:end].tobytes())

    def _grouped(self, path: Path, each: int) -> dict[str, Any]:
        """Writes the chunk of one part, ordered by step, and returns what the header says of it."""
        first = each * self._chunk
        steps = min(self._chunk, self._steps - first)
        pairs = np.fromfile(path, dtype=_PAIR)
        records = pairs["record"][np.argsort(pairs["step"], kind="stable")]
        counts = np.bincount(pairs["step"], minlength=steps)
        if isinstance(self._law, TruncatedPoisson):
            records, counts = self._cut(records, counts, self._law.cap, first)
        number = (self._number - 1) * self._count + each
        kind = "<u4" if self._size <= 2**32 else "<u8"
        # The salt keeps the digest, which is public, from telling of a schedule that is short enough to be guessed.
        content = os.urandom(SALT_BYTES) + counts.astype("<u8").tobytes() + records.astype(kind).tobytes()
        _write(self._folder / chunk_name(number), content)
        return {
            "first": (self._number - 1) * self._steps + first,
            "steps": steps,
            "sha256": sha256(content).hexdigest(),
        }

    def _cut(
        self, records: npt.NDArray[np.uint64], counts: npt.NDArray[np.int64], cap: int, first: int
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
        """Returns the batches of a chunk, of each of which at most `cap` records are kept, chosen at random."""
        kept = []
        for index, batch in enumerate(np.split(records, np.cumsum(counts)[:-1])):
            kept.append(batch)
            if len(batch) > cap:
                step = address(self._number, first + index)
                chosen = chosen_indices(self._stream, count=cap, size=len(batch), step=step, name="truncation")
                kept[-1] = batch[chosen]
        return np.concatenate(kept), np.minimum(counts, cap)


def _write(path: Path, content: bytes) -> None:
    """Writes a new file that its owner alone can read."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
