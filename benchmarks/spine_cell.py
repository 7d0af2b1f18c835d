"""Times one whole training step of one network, batch size and library, beside the floor in the same process.

The *floor* is zero_grad, forward, backward and an SGD step without privacy, plus one `torch.randn` over the parameters:
what a private step cannot do without. Steps of the floor and of the contender alternate, and the ratio is the median
over the pairs, so that whatever else the machine does falls on both. The data loader is left out: the batch is fixed.

    python -m benchmarks.spine_cell --network mnist --batch 64 --contender privet [--memory] [--seconds 10]

prints one line of JSON. With `--memory` it does not time: it prints the most resident memory that steps needed above
what was resident before the first, from the kernel's own high-water mark.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.networks import NETWORKS, Batch, Network

__all__ = ["CONTENDERS", "FORMS"]

Step = Callable[[], object]
LEARNING_RATE = 0.01
FORMS = ("as written", "channels_last", "sparse")


def in_form(network: Network, batch: Batch, form: str) -> tuple[nn.Module, Batch]:
    """Returns a fresh model and the batch in a form of the network."""
    torch.manual_seed(0)
    if form == "sparse" and network.sparse is not None:
        return network.sparse(), batch
    model, (inputs, targets) = network.build(), batch
    if form == "channels_last":
        model = model.to(memory_format=torch.channels_last)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    return model, (inputs, targets)


def plain(model: nn.Module, batch: Batch) -> Step:
    """Returns a step without privacy."""
    optimizer, (inputs, targets) = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE), batch

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    return step


def floor(model: nn.Module, batch: Batch) -> Step:
    """Returns a step without privacy, and noise for as many numbers as the model has."""
    count, step = sum(p.numel() for p in model.parameters()), plain(model, batch)

    def with_noise() -> Tensor:
        step()
        return torch.randn(count)

    return with_noise


def privet_engine(model: nn.Module, batch: Batch) -> Step:
    """Returns a step through the paper's door."""
    from privet.engine import PrivacyEngine

    inputs, targets = batch
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=len(inputs))
    model, optimizer, _ = PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
    )

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    return step


def privet_step(model: nn.Module, batch: Batch) -> Step:
    """Returns a step through the explicit door."""
    from privet.clipping import Flat
    from privet.mechanism import Gaussian, Mechanism
    from privet.sampling import Poisson
    from privet.step import PrivateStep

    mechanism = Mechanism(
        sampling=Poisson(rate=0.01), clipping=Flat(1.0), noise=Gaussian(multiplier=1.0), steps=1_000_000
    )

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    step = PrivateStep(
        model, optimizer=optimizer, mechanism=mechanism, loss_per_example=loss, expected_batch_size=len(batch[1])
    )
    return lambda: step(batch)


def opacus(model: nn.Module, batch: Batch) -> Step:
    """Returns a step of Opacus with materialised gradients, its default."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    inputs, targets = batch
    wrapped = GradSampleModule(model)
    sgd = torch.optim.SGD(wrapped.parameters(), lr=LEARNING_RATE)
    optimizer = DPOptimizer(sgd, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=len(targets))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(wrapped(inputs), targets).backward()
        optimizer.step()

    return step


def opacus_ghost(model: nn.Module, batch: Batch) -> Step:
    """Returns a step of Opacus with ghost clipping."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    inputs, targets = batch
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=1.0, use_ghost_clipping=True)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(wrapped.parameters(), lr=LEARNING_RATE),
        noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=len(targets),
    )  # fmt: skip
    criterion = DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss())

    def step() -> None:
        optimizer.zero_grad()
        criterion(wrapped(inputs), targets).backward()
        optimizer.step()

    return step


CONTENDERS = {
    "plain": plain,
    "privet": privet_step,
    "privet engine": privet_engine,
    "opacus": opacus,
    "opacus ghost": opacus_ghost,
}


def timed(step: Step) -> float:
    """Returns the seconds that one step takes."""
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def time_pairs(reference: Step, contender: Step, *, seconds: float) -> dict[str, float | int]:
    """Returns the medians over alternating pairs, the ratio's quartiles, and the contender's first step by itself."""
    first = timed(contender)
    timed(reference)
    rough = max(sum(timed(each) for each in (reference, contender)) for _ in range(2))
    pairs = []
    for index in range(min(max(int(seconds / rough), 7), 101)):
        # Which of the two goes first alternates as well.
        if index % 2:
            ours, theirs = timed(contender), timed(reference)
        else:
            theirs, ours = timed(reference), timed(contender)
        pairs.append((ours, theirs))
    low, middle, high = statistics.quantiles([ours / theirs for ours, theirs in pairs], n=4)
    return {
        "pairs": len(pairs),
        "ms": 1e3 * statistics.median(ours for ours, _ in pairs),
        "floor_ms": 1e3 * statistics.median(theirs for _, theirs in pairs),
        "ratio": middle,
        "ratio_low": low,
        "ratio_high": high,
        "first_ms": 1e3 * first,
    }


def resident(field: str) -> int:
    """Returns a field of this process's memory status, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def peak_memory(step: Step, *, steps: int = 4) -> dict[str, float]:
    """Returns the MiB that steps need at their height, above what was resident before the first."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident("VmRSS")
    for _ in range(steps):
        step()
    return {"peak_mib": (resident("VmHWM") - before) / 2**20}


def measured(options: argparse.Namespace) -> dict[str, float | int]:
    """Returns one measurement of one contender."""
    torch.manual_seed(0)
    network = NETWORKS[options.network]
    data = network.batch(options.batch)
    step = CONTENDERS[options.contender](*in_form(network, data, options.form))
    if options.memory:
        return dict(peak_memory(step))
    return time_pairs(floor(*in_form(network, data, options.floor_form)), step, seconds=options.seconds)


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description="One cell of the benchmark of whole steps.")
    parser.add_argument("--network", choices=NETWORKS, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--contender", choices=CONTENDERS, required=True)
    parser.add_argument("--form", choices=FORMS, default="as written", help="of the contender's model")
    parser.add_argument("--floor-form", choices=FORMS, default="as written", help="of the floor's model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="about how long to time pairs")
    parser.add_argument("--limit-gib", type=float, default=12.0, help="address space that the process may take")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of time")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    limit = int(options.limit_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    result: dict[str, float | int | str]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            result = measured(options)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        result = {"failed": f"needs more than {options.limit_gib:g} GiB"}
    print(json.dumps({**vars(options), **result}))


if __name__ == "__main__":
    main()
