"""Times one layer alone at one batch size, every contender beside `torch.nn` in the same process.

The layers and their shapes are those of Yousefpour et al. (arXiv 2109.12298, Fig. 3 and 5), as the configuration of
that paper's own micro-benchmark states them. Every contender does a forward and a backward of a mean squared error:

    torch.nn      without privacy
    privet        the explicit door's forward, backward and clipped sum, without noise and optimizer
    privet hooks  the paper's door in mode "hooks", which materialises per-example gradients
    opacus        GradSampleModule, likewise

    python -m benchmarks.layer_cell --layer linear --batch 64 [--contender privet] [--seconds 1] [--memory]

prints one line of JSON. Rounds in which each contender has one turn alternate, and a factor is the median over the
rounds; a turn of a quick layer is several steps. With `--memory` it takes one contender and prints the most memory that
its steps needed above what was resident before, by the kernel's high-water mark.

Axes: B examples, T positions.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.modes import peaks
from benchmarks.spine_cell import Step, resident

__all__ = ["BATCHES", "CONTENDERS", "LAYERS", "Layer"]

SEED = 0
BATCHES = (16, 32, 64, 128, 256, 512, 1024, 2048)
VOCABULARY = 20_000
TURN = 2e-3  # seconds that a turn lasts at least, so that the clock and the interpreter do not decide


@dataclass(frozen=True)
class Layer:
    """A layer, the shape of one example, and what one step costs without privacy."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    output: tuple[int, ...]
    parameters: int
    flop: int
    """Operations of one example's forward and ordinary weight gradient."""
    described: str
    predicted: str
    """What privacy should add, by counting."""
    instantiates: bool = False
    """Whether the quickest known formula for the norms has all per-example gradients at once."""

    def inputs(self, batch: int) -> Tensor:
        """Returns random inputs; an example of shape () is a token."""
        return torch.randn(batch, *self.shape) if self.shape else torch.randint(VOCABULARY, (batch,))

    def bytes(self, batch: int, *, contender: str) -> int:
        """Returns about how many bytes a step needs at its height."""
        per_output = 4 * math.prod(self.output)
        plain = 4 * self.parameters + 3 * batch * per_output
        if contender == "torch.nn" or (contender == "privet" and not self.instantiates):
            return plain
        copies = 1 if contender == "privet" else 2  # materialised rows are scaled, in a second tensor
        return plain + copies * 4 * self.parameters * batch


LAYERS: Mapping[str, Layer] = {
    "conv": Layer(
        build=lambda: nn.Conv2d(64, 64, 8),
        shape=(64, 50, 100),
        output=(64, 43, 93),
        parameters=64 * 64 * 64 + 64,
        flop=4 * 43 * 93 * 64 * 64 * 64,
        described="Conv2d(64, 64, 8) of (B, 64, 50, 100)",
        predicted="Norms need each example's weight gradient, the operations of the ordinary one (2.1 GFLOP of 4.2 an "
        "example); the sum from those rows is 0.5 MFLOP more: time 1.0 if both are equally efficient, 1.5 if the sum "
        "is a convolution again. Rows are 1.05 MB beside 1.0 MB of outputs and as much of their gradients.",
        instantiates=True,
    ),
    "linear": Layer(
        build=lambda: nn.Linear(512, 512),
        shape=(512,),
        output=(512,),
        parameters=512 * 512 + 512,
        flop=4 * 512 * 512,
        described="Linear(512, 512) of (B, 512)",
        predicted="A norm is the product of two rows' norms, 2 kFLOP beside 1049 an "
        "example, and the sum is one product as without privacy: "
        "time 1.0 and fixed cost; memory 1.0 and 2 kB an example. Materialised: 1.05 MB an example written, then read "
        "for the sum.",
    ),
    "embedding": Layer(
        build=lambda: nn.Embedding(VOCABULARY, 100),
        shape=(),
        output=(100,),
        parameters=VOCABULARY * 100,
        flop=2 * 100,
        described="Embedding(20000, 100) of (B,) tokens",
        predicted="Without privacy a step is the 8 MB gradient set to zero and B rows of 400 B added. Norms read those "
        "rows once and the sum adds them: time and memory 1.0. Materialised: 8 MB an example, a factor of about B.",
    ),
    "layernorm": Layer(
        build=lambda: nn.LayerNorm(64),
        shape=(64,),
        output=(64,),
        parameters=128,
        flop=10 * 64,
        described="LayerNorm(64) of (B, 64)",
        predicted="One position an example: rows g·x and g are 512 B beside 256 B of input, read twice more. The step "
        "itself is microseconds, so that the fixed cost of capture, some tens of operations, decides the factor.",
        instantiates=True,
    ),
    "groupnorm": Layer(
        build=lambda: nn.GroupNorm(16, 256),
        shape=(256,),
        output=(256,),
        parameters=512,
        flop=10 * 256,
        described="GroupNorm(16, 256) of (B, 256)",
        predicted="As LayerNorm with 2 kB of rows beside 1 kB of input: fixed cost until B is in the thousands.",
        instantiates=True,
    ),
    "instancenorm": Layer(
        build=lambda: nn.InstanceNorm1d(256, affine=True),
        shape=(256, 64),
        output=(256, 64),
        parameters=512,
        flop=10 * 256 * 64,
        described="InstanceNorm1d(256, affine) of (B, 256, 64)",
        predicted="Input 64 kB and rows 2 kB an example: the rule normalises again and reduces over 64 positions, two "
        "or three passes over 64 kB beside about ten of the step: time 1.2 to 1.4; memory, one normalised copy more.",
        instantiates=True,
    ),
}


def losses(layer: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:  # (B,)
    """Returns each example's mean squared error."""
    return F.mse_loss(layer(batch[0]), batch[1], reduction="none").flatten(1).mean(1)


def plain(layer: nn.Module, batch: tuple[Tensor, Tensor]) -> Step:
    """Returns a forward and backward without privacy."""

    def step() -> None:
        F.mse_loss(layer(batch[0]), batch[1]).backward()
        layer.zero_grad()

    return step


def privet(layer: nn.Module, batch: tuple[Tensor, Tensor]) -> Step:
    """Returns the explicit door's way to a clipped sum, in one pass."""
    from privet import Flat
    from privet.gradients.capture.capture import Capture
    from privet.gradients.capture.coverage import learn_layouts
    from privet.gradients.passes.one_pass import OnePass

    parameters = dict(layer.named_parameters())
    capture = Capture(parameters)
    learn_layouts(capture, lambda both: (losses(layer, both),), batch, examples=len(batch[0]))
    way, policy = OnePass(capture), Flat(1.0)

    def step() -> None:
        way.clipped_sum(
            lambda both: losses(layer, both), batch, examples=len(batch[0]), parameters=parameters, policy=policy
        )

    return step


def privet_hooks(layer: nn.Module, batch: tuple[Tensor, Tensor]) -> Step:
    """Returns the paper's door in the mode that materialises."""
    from torch.utils.data import DataLoader, TensorDataset

    from privet import PrivacyEngine

    PrivacyEngine().make_private(
        module=layer,
        optimizer=torch.optim.SGD(layer.parameters(), lr=0.0),
        data_loader=DataLoader(TensorDataset(*batch), batch_size=len(batch[0])),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode="hooks",
    )
    return plain(layer, batch)


def opacus(layer: nn.Module, batch: tuple[Tensor, Tensor]) -> Step:
    """Returns the same of Opacus."""
    from opacus import GradSampleModule

    return plain(GradSampleModule(layer), batch)


CONTENDERS: Mapping[str, Callable[[nn.Module, tuple[Tensor, Tensor]], Step]] = {
    "torch.nn": plain,
    "privet": privet,
    "privet hooks": privet_hooks,
    "opacus": opacus,
}


def prepared(layer: str, batch: int, contender: str) -> Step:
    """Returns a contender's step; weights and data are the same for all."""
    torch.manual_seed(SEED)
    described = LAYERS[layer]
    data = (described.inputs(batch), torch.randn(batch, *described.output))
    return CONTENDERS[contender](described.build(), data)


def turn(step: Step, steps: int) -> float:
    """Returns the seconds of one step, the mean of several."""
    begun = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - begun) / steps


def timed(steps: Mapping[str, Step], *, seconds: float) -> dict[str, dict[str, float | int]]:
    """Returns, by contender, the medians over alternating turns and the factor's quartiles."""
    for step in steps.values():
        turn(step, 2)  # the first holds checks and the filling of pools
    rough = {name: turn(step, 1) for name, step in steps.items()}
    repeats = {name: max(1, math.ceil(TURN / each)) for name, each in rough.items()}
    one_round = sum(rough[name] * repeats[name] for name in steps)
    rounds: list[dict[str, float]] = []
    names = list(steps)
    for index in range(min(max(int(seconds / one_round), 3), 201)):
        shift = index % len(names)  # who goes first changes
        rounds.append({name: turn(steps[name], repeats[name]) for name in names[shift:] + names[:shift]})
    found: dict[str, dict[str, float | int]] = {}
    for name in names:
        low, middle, high = statistics.quantiles([each[name] / each["torch.nn"] for each in rounds], n=4)
        milliseconds = 1e3 * statistics.median(each[name] for each in rounds)
        found[name] = {"ms": milliseconds, "factor": middle, "low": low, "high": high, "rounds": len(rounds)}
    return found


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description="One cell of the benchmark of single layers.")
    parser.add_argument("--layer", choices=LAYERS, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--contender", choices=CONTENDERS, action="append", help="all, unless given")
    parser.add_argument("--seconds", type=float, default=1.0, help="about how long to time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit-gib", type=float, default=6.0, help="address space beyond that of the libraries")
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    contenders = options.contender or list(CONTENDERS)
    result: dict[str, object]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            steps = {name: prepared(options.layer, options.batch, name) for name in contenders}
            limit = int(options.limit_gib * 2**30) + resident("VmSize")
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            if options.memory:
                result = dict(peaks(steps[contenders[0]]))
            else:
                result = dict(timed(steps, seconds=options.seconds))
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        result = {"failed": f"needs more than {options.limit_gib:g} GiB"}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
