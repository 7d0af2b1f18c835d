"""ChaCha20: the known answer of RFC 8439, a well-kept implementation, and the kernel beside its twin."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from hypothesis import example, given, settings
from hypothesis import strategies as st

from privet.noise import DeviceNoise, NoiseKey, fused
from privet.noise import device as device_module
from privet.noise.chacha import chacha_words


def signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def block_of(words: torch.Tensor) -> bytes:
    return words.numpy().astype("<i8").tobytes()


def oracle(key: bytes, counter: int, nonce: int) -> bytes:
    """One block by the cryptography library, to which the whole 128 bits are given."""
    cipher = Cipher(ChaCha20(key, struct.pack("<QQ", counter, nonce)), mode=None)
    return cipher.encryptor().update(bytes(64))


def test_the_known_answer_of_the_standard():
    # RFC 8439, section 2.3.2: its 32-bit counter and 96-bit nonce are other names for the same four words.
    key = bytes(range(32))
    low, high = struct.unpack("<QQ", struct.pack("<I", 1) + bytes.fromhex("000000090000004a00000000"))
    expected = bytes.fromhex(
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )
    found = chacha_words(torch.tensor([signed(low)]), torch.tensor([signed(high)]), key=key)
    assert block_of(found) == expected == oracle(key, low, high)


word = st.integers(0, 2**64 - 1)


@settings(max_examples=50, deadline=None)
@given(key=st.binary(min_size=32, max_size=32), blocks=st.lists(st.tuples(word, word), min_size=1, max_size=5))
@example(key=b"\xff" * 32, blocks=[(2**64 - 1, 2**64 - 1), (2**32 - 1, 0), (2**32, 2**63)])
def test_every_block_is_that_of_a_well_kept_implementation(key, blocks):
    counters, nonces = (torch.tensor([signed(pair[i]) for pair in blocks]) for i in (0, 1))
    assert block_of(chacha_words(counters, nonces, key=key)) == b"".join(oracle(key, *pair) for pair in blocks)


@pytest.fixture(autouse=True)
def _asked_anew():
    device_module._fuses.cache_clear()
    yield
    device_module._fuses.cache_clear()


@pytest.mark.parametrize("cause", ["is not installed", "failed", "draws other values"])
def test_without_a_kernel_that_is_right_tensor_operations_draw_and_say_so_once(monkeypatch, cause):
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler")

    where = torch.device("cpu") if cause != "is not installed" else torch.device("cuda")
    monkeypatch.setattr(device_module, "can_fuse", lambda device: cause != "is not installed")
    monkeypatch.setattr(
        device_module, "add_normals_", failing if cause == "failed" else lambda out, **_: out.fill_(0.5)
    )
    with pytest.warns(UserWarning, match=cause):
        assert not device_module._fuses(where)
    assert not device_module._fuses(where)  # a second warning would be an error here


@pytest.fixture
def kernel(monkeypatch):
    """Makes Triton interpret its kernels, on the CPU."""
    pytest.importorskip("triton", reason="Triton interprets its kernels here: make test-kernels")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    device_module._fuses.cache_clear()
    assert device_module._fuses(torch.device("cpu"))


def both(monkeypatch, run):
    """Returns what `run` makes with the kernel, and what it makes with tensor operations."""
    by_kernel = run()
    with monkeypatch.context() as without:
        without.setattr(device_module, "_fuses", lambda device: False)
        return by_kernel, run()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("size", "offset"), [(1, 0), (1, 7), (8, 0), (9, 3), (2000, 0), (2051, 2**40 + 5), (17, 2**35 - 3)]
)
def test_the_kernel_is_its_twin(monkeypatch, dtype, error, size, offset):
    def run():
        source = DeviceNoise(NoiseKey.from_generator(torch.Generator().manual_seed(3)))
        start = torch.linspace(-1, 1, size, dtype=dtype)
        return source.add_(start, std=0.3, name="weight", step=11, offset=offset)

    by_kernel, by_operations = both(monkeypatch, run)
    torch.testing.assert_close(by_kernel, by_operations, rtol=0, atol=error)
    assert not torch.allclose(by_kernel, torch.linspace(-1, 1, size, dtype=dtype), atol=1e-3)


@pytest.mark.usefixtures("kernel")
def test_the_kernel_leaves_memory_around_a_shard_and_any_layout_alone(monkeypatch):
    def run():
        source = DeviceNoise(NoiseKey.from_generator(torch.Generator().manual_seed(3)))
        whole = torch.zeros(40, dtype=torch.float64)
        source.add_(whole[10:21], std=1.0, name="w", step=0, offset=5)
        turned = torch.zeros(6, 5, dtype=torch.float64).T
        source.add_(turned, std=1.0, name="v", step=0)
        return torch.cat([whole, turned.reshape(-1)])

    by_kernel, by_operations = both(monkeypatch, run)
    torch.testing.assert_close(by_kernel, by_operations, rtol=0, atol=1e-13)
    assert not by_kernel[:10].any()
    assert not by_kernel[21:40].any()
    assert by_kernel[10:21].all()


@pytest.mark.usefixtures("kernel")
def test_the_kernel_reads_the_key_when_it_runs(monkeypatch):
    # By this a captured graph draws new noise: the same launch, after the words of the step were replaced.
    out = [torch.zeros(64, dtype=torch.float64) for _ in range(3)]
    words = fused.step_words(bytes(32), 1.0, torch.device("cpu")).clone()
    fused.add_normals_(out[0], words=words, tag=5, offset=0)
    fused.add_normals_(out[1], words=words, tag=5, offset=0)
    words.copy_(fused.step_words(b"\x01" * 32, 1.0, torch.device("cpu")))
    fused.add_normals_(out[2], words=words, tag=5, offset=0)
    assert torch.equal(out[0], out[1])
    assert not np.isclose(out[0], out[2]).any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gpu_draws_what_the_host_draws_by_tensor_operations(dtype):
    def drawn(device: str) -> torch.Tensor:
        source = DeviceNoise(NoiseKey.from_generator(torch.Generator().manual_seed(3)))
        return source.add_(torch.zeros(100_003, dtype=dtype, device=device), std=0.5, name="w", step=2, offset=13).cpu()

    assert device_module._fuses(torch.device("cuda", 0))
    torch.testing.assert_close(drawn("cuda"), drawn("cpu"), rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)
