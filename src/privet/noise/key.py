"""Keys: where all randomness of a run comes from, and how a copy of a run never repeats it.

Guarantees
----------
A key comes from the operating system, never from torch's global seed. It is not shown by `repr`, is no attribute that
`vars` shows in clear text to a log, and is not in any `state_dict`. A copy, a deepcopy, an unpickled copy and a forked
process hold another key, so that no noise value is met twice.

    what happens              a fresh key           a reproducible key (from a generator; for tests)
    repr, str, format         no secret             no secret
    copy, deepcopy, pickle    a new key             the same key
    fork                      a new key             the same key
    resume (`renew`)          a new key             the same key
    resume, a shared key      the next key, which is the same on all ranks
    `predictable`             False                 True: it says so in ledger and report

Keys per purpose are HMAC-SHA256 of the master key, the expansion step of HKDF (RFC 5869, section 2.3) for outputs of
one block; the master key is uniform already, so the extraction step has nothing to do.
"""

from __future__ import annotations

import hmac
import os
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from privet.errors import ConfigurationError, ProtocolError

if TYPE_CHECKING:
    import torch

__all__ = ["KEY_BYTES", "NoiseKey", "noise_key"]

KEY_BYTES = 32
_LIVE: weakref.WeakSet[NoiseKey] = weakref.WeakSet()


class NoiseKey:
    """A 256-bit master key. Build one with `fresh`, `from_generator` (reproducible) or `from_secret`."""

    def __init__(self, secret: bytes, *, predictable: bool, claimed: Iterable[str] = (), shared: bool = False) -> None:
        if len(secret) != KEY_BYTES:
            raise ConfigurationError(f"A noise key has {KEY_BYTES} bytes, got {len(secret)}.")
        self._secret = bytes(secret)
        self._predictable = predictable
        self._shared = shared
        self._process = os.getpid()
        self._generation = _unique()
        self._claimed = set(claimed)
        _LIVE.add(self)

    @classmethod
    def fresh(cls) -> NoiseKey:
        """Returns a key that the operating system has just drawn."""
        return cls(os.urandom(KEY_BYTES), predictable=False)

    @classmethod
    def from_generator(cls, generator: torch.Generator) -> NoiseKey:
        """Returns a reproducible key, read once from a generator. Who knows the seed knows the noise: for tests."""
        import torch

        if not isinstance(generator, torch.Generator):
            raise ConfigurationError(f"noise_generator must be a torch.Generator, got {type(generator).__name__}.")
        drawn = torch.randint(256, (KEY_BYTES,), generator=generator, device=generator.device, dtype=torch.uint8)
        return cls(bytes(drawn.tolist()), predictable=True)

    @classmethod
    def from_secret(cls, secret: bytes) -> NoiseKey:
        """Returns a key of 32 secret bytes drawn elsewhere: how several processes come to share one key.

        The sender gives `key.derive(...)`, never its master key. Using one secret for two runs repeats the noise.
        """
        return cls(secret, predictable=False)

    @classmethod
    def shared(cls, secret: bytes) -> NoiseKey:
        """Returns the key that all ranks of one run hold, of 32 bytes that one of them has just drawn and sent.

        On a resume it is renewed without a message: every rank derives the same next secret. So it must never be made
        of bytes that a run before has used. A copy and a forked child have a fresh key of their own, as for any key.
        """
        return cls(secret, predictable=False, shared=True)

    @property
    def predictable(self) -> bool:
        """Returns whether someone outside could compute the key: then the run is reproducible, and not private."""
        return self._predictable

    @property
    def generation(self) -> int:
        """Returns a number that no other key has, and that changes with the secret: by it, caches go out of date."""
        if os.getpid() != self._process:  # a fork that Python's own hooks did not see
            self.after_fork()
        return self._generation

    def derive(self, purpose: str) -> bytes:
        """Returns the 32-byte key of one purpose. Keys of different purposes tell nothing of each other."""
        _ = self.generation
        return hmac.digest(self._secret, b"privet key:" + purpose.encode(), "sha256")

    def claim(self, purpose: str) -> None:
        """Reserves a purpose for one user of a fresh key: two would draw the same values for different sums.

        A reproducible key may be used again, which is what it is for.
        """
        if not self._predictable and purpose in self._claimed:
            raise ProtocolError(
                f"This key already serves one source of {purpose}; a second would repeat its values. "
                f"Give each its own key: NoiseKey.fresh()."
            )
        self._claimed.add(purpose)

    def renew(self) -> None:
        """Replaces the secret by a fresh one, unless the key is reproducible: a resumed run never repeats noise."""
        if not self._predictable:
            self._secret = self.derive("renewal") if self._shared else os.urandom(KEY_BYTES)
            self._generation = _unique()

    def fingerprint(self) -> str | None:
        """Returns a short hash by which a reproducible key is recognised; None for a fresh one, never met again."""
        return self.derive("fingerprint").hex()[:32] if self._predictable else None

    def after_fork(self) -> None:
        """Renews the key in a forked process: called by Python's own hook, or by the first use under another pid."""
        self._process, self._shared = os.getpid(), False
        self.renew()

    def __copy__(self) -> NoiseKey:
        # Claims are kept: what shared a key before shares the new one after a deepcopy of both.
        secret = self._secret if self._predictable else os.urandom(KEY_BYTES)
        return NoiseKey(secret, predictable=self._predictable, claimed=self._claimed)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoiseKey:
        copied = memo[id(self)] = self.__copy__()
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        if self._predictable:
            return _reproduced, (self._secret,)
        return NoiseKey.fresh, ()

    def __repr__(self) -> str:
        return f"NoiseKey({'reproducible' if self._predictable else 'secret'})"


def noise_key(*, secure_mode: bool, generator: torch.Generator | None) -> NoiseKey:
    """Returns a fresh key, or a reproducible one from a generator."""
    if generator is None:
        return NoiseKey.fresh()
    if secure_mode:
        raise ConfigurationError(
            "noise_generator makes the noise reproducible, and secure_mode demands noise that nobody can reproduce. "
            "Give one of the two."
        )
    return NoiseKey.from_generator(generator)


def _unique() -> int:
    """Returns a number that no other key and no other process has: what was cached under one key fits no other."""
    return int.from_bytes(os.urandom(16), "big")


def _reproduced(secret: bytes) -> NoiseKey:
    return NoiseKey(secret, predictable=True)


def _after_fork() -> None:
    for key in list(_LIVE):
        key.after_fork()


if hasattr(os, "register_at_fork"):  # POSIX; elsewhere there is no fork
    os.register_at_fork(after_in_child=_after_fork)
