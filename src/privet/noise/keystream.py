"""The secret words that noise and batches are made of: AES-256 in counter mode, addressed, never met twice.

Address of a word: (purpose, step, name, index).

    purpose -> a key of the master key
    step    -> a key of the purpose's key
    name    -> the upper 64 bits of the counter, the first 8 bytes of SHA-256(name)
    index   -> the lower 64 bits of the counter count blocks of 16 bytes, two words each

One step under one purpose has a key of its own, and different blocks of it have different counters as long as no two
names share 64 bits of SHA-256; `TagBook` keeps the names seen and refuses two that do.
AES-256: FIPS 197; counter mode: NIST SP 800-38A, section 6.5.
"""

from __future__ import annotations

import hashlib
import hmac
import threading
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR, ECB

from privet._checks import check_count
from privet.errors import ConfigurationError

if TYPE_CHECKING:
    from privet.noise.key import NoiseKey

__all__ = ["BLOCK_BYTES", "Keystream", "StepKey", "TagBook", "keystream_into", "scattered_words"]

BLOCK_BYTES = 16
LAST_STEP = 2**64 - 1
_ZEROS = memoryview(bytes(1 << 20))


class TagBook:
    """The 64-bit tags of names, and the refusal of two names with one tag."""

    def __init__(self) -> None:
        self._tags: dict[str, int] = {}
        self._names: dict[int, str] = {}

    def tag(self, name: str) -> int:
        """Returns the tag of a name, the same in every process."""
        known = self._tags.get(name)
        if known is not None:
            return known
        tag = self.hashed(name)
        other = self._names.setdefault(tag, name)
        if other != name:
            raise ConfigurationError(f"The names {other!r} and {name!r} share one 64-bit hash: rename one of them.")
        self._tags[name] = tag
        return tag

    @staticmethod
    def hashed(name: str) -> int:
        """Returns the first 64 bits of the name's SHA-256."""
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


class StepKey:
    """The key of one step under one purpose, and its cipher: kept until step or master key change, never copied."""

    def __init__(self, key: NoiseKey, *, purpose: str) -> None:
        self._key = key
        self._purpose = purpose
        self._kept: tuple[tuple[int, int, int], CipherContext] | None = None
        self._kept_blocks: tuple[tuple[int, int, int], CipherContext] | None = None

    def at(self, step: int) -> bytes:
        """Returns the 32-byte key of a step."""
        if check_count("step", step) > LAST_STEP:
            raise ConfigurationError(f"step must be below 2**64, got {step}.")
        return hmac.digest(self._key.derive(self._purpose), step.to_bytes(8, "big"), "sha256")

    def cipher(self, step: int) -> CipherContext:
        """Returns the cipher of a step, which this thread has for itself: a context holds its place in the stream."""
        wanted = (self._key.generation, step, threading.get_ident())
        kept = self._kept  # read once, so that another thread cannot change it in between
        if kept is None or kept[0] != wanted:
            kept = self._kept = wanted, Cipher(AES(self.at(step)), CTR(bytes(BLOCK_BYTES))).encryptor()
        return kept[1]

    def blocks(self, step: int) -> CipherContext:
        """Returns what encrypts single blocks under the key of a step: counters in any order make the same words."""
        wanted = (self._key.generation, step, threading.get_ident())
        kept = self._kept_blocks
        if kept is None or kept[0] != wanted:
            cipher = Cipher(AES(self.at(step)), ECB())  # noqa: S305  # of counters that are all different
            kept = self._kept_blocks = wanted, cipher.encryptor()
        return kept[1]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": None, "_kept_blocks": None}


def keystream_into(out: memoryview, *, cipher: CipherContext, tag: int, block: int, size: int) -> None:
    """Writes `size` bytes of keystream from `block` on into `out`, which has `BLOCK_BYTES` to spare behind them."""
    assert block + size // BLOCK_BYTES <= 1 << 64, "the counter would run into the next name"
    cipher.reset_nonce((tag << 64 | block).to_bytes(BLOCK_BYTES, "big"))
    for start in range(0, size, len(_ZEROS)):  # counter mode XORs: of zeros it leaves the keystream itself
        part = min(len(_ZEROS), size - start)
        cipher.update_into(_ZEROS[:part], out[start : start + part + BLOCK_BYTES])


def scattered_words(
    blocks: npt.NDArray[np.int64],  # (N,)
    *,
    cipher: CipherContext,  # of `StepKey.blocks`
    tag: int,
) -> npt.NDArray[np.int64]:  # (N, 2)
    """Returns the two words of each of some blocks, as bit patterns: those that `keystream_into` writes for them."""
    counters = np.empty((len(blocks), 2), dtype=">u8")
    counters[:, 0], counters[:, 1] = tag, blocks
    raw = bytearray(counters.nbytes + BLOCK_BYTES)
    cipher.update_into(counters.tobytes(), raw)
    return np.frombuffer(raw, dtype="<i8", count=2 * len(blocks)).astype(np.int64, copy=False).reshape(-1, 2)


class Keystream:
    """Secret uniform 64-bit words as a function of (key, purpose, step, name, index)."""

    def __init__(self, key: NoiseKey, *, purpose: str) -> None:
        self._keys = StepKey(key, purpose=purpose)
        self._tags = TagBook()

    def words(self, count: int, *, step: int, name: str, start: int = 0) -> npt.NDArray[np.uint64]:
        """Returns `count` uniform words from index `start` on: shape (count,)."""
        block, skipped = divmod(start, 2)
        size = -(-(count + skipped) // 2) * BLOCK_BYTES
        raw = bytearray(size + BLOCK_BYTES)
        keystream_into(
            memoryview(raw), cipher=self._keys.cipher(step), tag=self._tags.tag(name), block=block, size=size
        )
        return np.frombuffer(raw, dtype="<u8", count=count + skipped)[skipped:]
