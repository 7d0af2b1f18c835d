"""Which errors say that memory ran out."""

from __future__ import annotations

import pytest
import torch

from privet.batches.out_of_memory import is_out_of_memory
from privet.errors import OutOfMemoryError


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
        (OutOfMemoryError("nothing helped"), False),
    ],
)
def test_which_errors_mean_that_memory_ran_out(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
    outer = ValueError("while something else")
    outer.__cause__ = error
    assert is_out_of_memory(outer) is expected


def test_the_allocator_of_the_cpu_raises_such_an_error() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
