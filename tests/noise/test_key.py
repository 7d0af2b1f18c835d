"""Keys: fresh from the operating system, never shown, and never the same in a copy, a fork or a resumed run."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from privet.errors import ConfigurationError, ProtocolError
from privet.noise import NoiseKey, SecureNoise

SOURCE = Path(__file__).resolve().parents[2] / "src"


def reproducible(seed: int = 0) -> NoiseKey:
    return NoiseKey.from_generator(torch.Generator().manual_seed(seed))


def drawn(source: SecureNoise, step: int = 0) -> torch.Tensor:
    return source.fill_(torch.empty(100), std=1.0, name="weight", step=step)


def test_the_global_seed_does_not_reach_the_key():
    keys = []
    for _ in range(2):
        torch.manual_seed(0)
        keys.append(NoiseKey.fresh().derive("noise"))
    assert keys[0] != keys[1]


def test_purposes_have_different_keys_and_one_purpose_the_same():
    key = NoiseKey.fresh()
    assert key.derive("noise") == key.derive("noise")
    assert key.derive("noise") != key.derive("sampling")
    assert len(key.derive("noise")) == 32


def test_derivation_is_the_expansion_of_hkdf():
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

    secret = bytes(range(32))
    # The first block of RFC 5869's expansion is HMAC(key, info || 0x01): ours with an info that ends so.
    ours = NoiseKey.from_secret(secret).derive("noise\x01")
    assert ours == HKDFExpand(SHA256(), 32, b"privet key:noise").derive(secret)


def test_a_generator_gives_a_reproducible_key_and_is_read_once():
    one, two = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    assert NoiseKey.from_generator(one).derive("noise") == NoiseKey.from_generator(two).derive("noise")
    assert NoiseKey.from_generator(one).derive("noise") != reproducible(3).derive("noise")  # it moved on
    assert reproducible(3).predictable
    assert not NoiseKey.fresh().predictable
    with pytest.raises(ConfigurationError, match=r"torch\.Generator"):
        NoiseKey.from_generator(3)


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda key: pickle.loads(pickle.dumps(key))])
def test_a_copy_is_another_key_unless_reproducible(clone):
    fresh = NoiseKey.fresh()
    assert clone(fresh).derive("noise") != fresh.derive("noise")
    assert not clone(fresh).predictable
    known = reproducible()
    assert clone(known).derive("noise") == known.derive("noise")
    assert clone(known).predictable


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda source: pickle.loads(pickle.dumps(source))])
def test_a_copied_source_draws_other_noise_even_at_a_step_whose_key_was_at_hand(clone):
    source = SecureNoise(NoiseKey.fresh())
    before = drawn(source)
    other = drawn(clone(source))
    assert not torch.equal(before, other)
    assert torch.equal(drawn(source), before)
    known = SecureNoise(reproducible())
    assert torch.equal(drawn(known), drawn(clone(known)))


def test_no_key_is_shown_or_saved():
    key = NoiseKey.fresh()
    source = SecureNoise(key)
    drawn(source)
    secrets = [key._secret, key.derive("noise"), source._keys.at(0)]
    assert source._keys._kept is not None
    texts = [repr(key), str(key), f"{source.state_dict()}", repr(source)]
    for secret in secrets:
        assert secret not in pickle.dumps(source)
        assert all(secret.hex() not in text and repr(secret) not in text for text in texts)


def test_renewal_changes_a_fresh_key_and_keeps_a_reproducible_one():
    for key, same in ((NoiseKey.fresh(), False), (reproducible(), True)):
        before, generation = key.derive("noise"), key.generation
        key.renew()
        assert (key.derive("noise") == before) is same
        assert (key.generation == generation) is same


def test_two_sources_of_one_fresh_key_are_refused():
    key = NoiseKey.fresh()
    SecureNoise(key)
    with pytest.raises(ProtocolError, match="its own key"):
        SecureNoise(key)
    with pytest.raises(ProtocolError):
        SecureNoise(copy.deepcopy(key))
    known = reproducible()
    assert torch.equal(drawn(SecureNoise(known)), drawn(SecureNoise(known)))


def test_a_key_has_32_bytes():
    with pytest.raises(ConfigurationError, match="32 bytes"):
        NoiseKey.from_secret(b"short")
    secret = bytes(range(32))
    assert NoiseKey.from_secret(secret).derive("noise") == NoiseKey.from_secret(secret).derive("noise")


FORK = """
import os, sys, torch
from privet.noise import Keystream, NoiseKey
hooked = sys.argv[1] == "hook"
process = os.getpid()
if hooked:  # the process number shows nothing
    os.getpid = lambda: process
else:  # a fork that runs no Python hook is seen by the process number
    NoiseKey.after_fork, undisturbed = (lambda self: None), NoiseKey.after_fork
key = NoiseKey.fresh() if sys.argv[2] == "fresh" else NoiseKey.from_generator(torch.Generator().manual_seed(0))
stream = Keystream(key, purpose="noise")  # what noise is made of, without torch's threads in the child
draw = lambda: stream.words(4, step=0, name="weight").tolist()
before = draw()
read, write = os.pipe()
if os.fork() == 0:
    if not hooked:
        NoiseKey.after_fork = undisturbed
    os.write(write, repr(draw()).encode())
    os._exit(0)
os.wait()
child = eval(os.read(read, 4096).decode())
assert draw() == before, "the parent keeps its key"
sys.exit(0 if (child != before) == (sys.argv[2] == "fresh") else 1)
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork on this system")
@pytest.mark.parametrize("kind", ["fresh", "reproducible"])
@pytest.mark.parametrize("seen_by", ["hook", "process number"])
def test_a_forked_run_draws_other_noise(seen_by, kind):
    environment = {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "PATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", FORK, seen_by, kind],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_a_shared_key_is_renewed_alike_on_all_ranks_and_never_comes_back():
    here, there = NoiseKey.shared(bytes(range(32))), NoiseKey.shared(bytes(range(32)))
    seen = [here.derive("noise")]
    for _ in range(3):
        before = here.generation
        here.renew()
        there.renew()
        assert here.generation != before
        assert here.derive("noise") == there.derive("noise")
        seen.append(here.derive("noise"))
    assert len(set(seen)) == 4
    assert not here.predictable


def test_a_copy_and_a_fork_of_a_shared_key_have_fresh_keys_which_no_other_rank_has():
    here, there = NoiseKey.shared(bytes(range(32))), NoiseKey.shared(bytes(range(32)))
    copies = [copy.copy(here), copy.deepcopy(here), pickle.loads(pickle.dumps(here))]
    there.after_fork()
    there.renew()
    here.renew()
    for each in copies:
        each.renew()
    assert len({key.derive("noise") for key in (here, there, *copies)}) == 5
