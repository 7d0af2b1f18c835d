"""Fashion-MNIST at one privacy budget by several mechanisms: samplings, correlated noise, views and averages.

    python -m benchmarks.fashion --data /usr/share/datasets/fashion-mnist --out benchmarks/results   # an hour or two
    python -m benchmarks.fashion --out benchmarks/results --report     # only the table and the plot again

A linear model on scattering features (`benchmarks.fashion_features`): no step learns the features, so that a run is
quick and nothing of them is private. All mechanisms have the budget, the clip norm, the expected batch size, momentum
and learning rate in common; the noise is calibrated to each. Runs that are in the file of results are not made again.

How passes and the learning rate were chosen: `--choose` trains on 55,000 of the training pictures with a seed of its
own, and looks at the other 5,000. What that search would have cost is not in ε, as in published tables. Bands are those
with the least error of the sums (`privet.noise.best_bands`, `optimized_bands`), which asks no data.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate

from benchmarks.fashion_features import features, shifted
from examples.fashion_mnist import dataset
from privet import (
    Augmented,
    CyclicPoisson,
    Flat,
    Gaussian,
    Mechanism,
    Partition,
    Poisson,
    PrivateStep,
    RandomAllocation,
    WeightAverage,
)
from privet.noise import Optimized, Workload, best_bands, optimized_bands, optimized_decays

DELTA, CLIP_NORM, MOMENTUM, HELD_OUT = 1e-5, 0.1, 0.9, 5_000
EPSILONS, SEEDS, CHOICE_SEED = (1.0, 3.0, 8.0), 5, 100
BANDS, DECAYS = (2, 4, 8, 16), 3
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "fashion.png"


@dataclass(frozen=True)
class Recipe:
    """What a run is made of."""

    name: str
    epsilon: float = 3.0
    seed: int = 0
    passes: int = 10
    batch_size: int = 2048
    learning_rate: float = 8.0
    views: int = 1
    held_out: bool = False

    def key(self) -> str:
        """Returns a name for the file of results."""
        return json.dumps(asdict(self))


class Taken:
    """Rows of a batch, gathered at once."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)


class Features(Dataset[tuple[Tensor, Tensor]]):
    """Features (N, F), or of several views (N, K, F), kept in float16, and labels (N,)."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index].float(), self.labels[index]

    def __getitems__(self, indices: list[int]) -> Taken:
        """Returns many rows: one gather in place of thousands."""
        places = torch.as_tensor(indices)
        return Taken(self.inputs[places].float(), self.labels[places])


def collated(rows: Any) -> Any:
    """Returns the batch of rows that were taken one by one, or at once."""
    return (rows.inputs, rows.labels) if isinstance(rows, Taken) else default_collate(rows)


def read(folder: Path, cache: Path, views: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns features and labels of `train` and `t10k`; those of each view are computed once, and kept in `cache`."""
    cache.mkdir(parents=True, exist_ok=True)
    found = {}
    for part in ("train", "t10k"):
        pictures, labels = dataset(folder, part).tensors
        seen = []
        for view in range(views if part == "train" else 1):
            file = cache / f"{part}_{view}.pt"
            if not file.exists():
                torch.manual_seed(view)
                shown = pictures[:, 0] if view == 0 else shifted(pictures[:, 0], mirror_all=view == 1)
                torch.save(features(shown).half(), file)
            seen.append(torch.load(file))
        found[part] = (seen[0] if len(seen) == 1 else torch.stack(seen, dim=1)), labels
    return found


def mechanism_of(recipe: Recipe, examples: int) -> Mechanism:
    """Returns the mechanism of a recipe with the least noise that fits the budget."""
    clipping, per_pass = Flat(CLIP_NORM), examples // recipe.batch_size
    rate, steps = recipe.batch_size / examples, recipe.passes * per_pass
    target = {"epsilon": recipe.epsilon, "delta": DELTA}
    work = Workload(momentum=MOMENTUM)
    if recipe.name == "Poisson":
        return Mechanism(Poisson(rate), clipping, Gaussian(1.0), steps).calibrated(**target)
    if recipe.name == "random allocation":
        return Mechanism(RandomAllocation(per_pass), clipping, Gaussian(1.0), recipe.passes).calibrated(**target)
    if recipe.name == "BandMF, cyclic Poisson":
        best = best_bands(**target, rate=rate, steps=steps, bands=BANDS, workload=work)[0]
        sampling = CyclicPoisson(best.bands * rate, best.bands)
        return Mechanism(sampling, clipping, best.noise, -(-steps // best.bands)).calibrated(**target)
    order = Partition(batch_size=recipe.batch_size, dataset_size=examples, drop_last=True)
    run = {"steps": steps, "participations": recipe.passes, "separation": per_pass, "workload": work}
    tries: list[Callable[[], Optimized[Any]]] = [lambda: optimized_decays(DECAYS, **run)]
    if recipe.name == "BandMF, fixed order":
        tries = [lambda bands=bands: optimized_bands(bands, **run) for bands in (*BANDS, per_pass)]
    best_noise = min((each() for each in tries), key=lambda found: found.loss).noise
    return Mechanism(order, clipping, best_noise, recipe.passes).calibrated(**target)


def trained(recipe: Recipe, data: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Trains, and returns the accuracies of the last weights and of both averages."""
    torch.manual_seed(recipe.seed)
    (inputs, labels), (seen, truth) = data["train"], data["t10k"]
    inputs = inputs if recipe.views > 1 or inputs.dim() == 2 else inputs[:, 0]
    order = torch.randperm(len(labels))
    train, held = order[:-HELD_OUT] if recipe.held_out else order, order[-HELD_OUT:]
    if recipe.held_out:
        seen, truth = inputs[held], labels[held]
        seen = seen if seen.dim() == 2 else seen[:, 0]
    mechanism = mechanism_of(recipe, len(train))
    model = nn.Linear(inputs.shape[-1], 10)
    nn.init.zeros_(model.weight)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.learning_rate, momentum=MOMENTUM)
    step = PrivateStep(
        model,
        optimizer=optimizer,
        mechanism=mechanism,
        loss_per_example=loss if recipe.views == 1 else Augmented(loss, views=recipe.views),
    )
    loader = step.batches(Features(inputs[train], labels[train]), collate_fn=collated)
    steps = recipe.passes * (len(train) // recipe.batch_size)
    averages = {
        "moving average": WeightAverage(model, optimizer, decay=0.98),
        "mean of the last half": WeightAverage(model, optimizer, start=steps // 2),
    }
    begun, taken = time.perf_counter(), 0
    while taken < steps:
        for batch in loader:
            step(batch)
            taken += 1
            if taken == steps:
                break
    models = {"last weights": model} | {name: each.averaged_model() for name, each in averages.items()}
    with torch.no_grad():
        right = {
            name: torch.cat([each(part.float()).argmax(1) for part in seen.split(5000)]).eq(truth).float().mean().item()
            for name, each in models.items()
        }
    return {
        "recipe": asdict(recipe),
        "accuracy": right,
        "epsilon": step.epsilon(delta=DELTA),
        "mechanism": repr(mechanism),
        "steps": taken,
        "seconds": round(time.perf_counter() - begun, 1),
    }


def recipes(chosen: dict[str, dict[str, Any]]) -> Iterator[Recipe]:
    """Yields every run of the table, one seed of all before the next one."""
    for seed in range(SEEDS):
        for epsilon in EPSILONS:
            for name, numbers in chosen.items():
                kind, _, views = name.partition(" + ")
                yield Recipe(kind, epsilon, seed, views=int(views.split()[0]) if views else 1, **numbers)


VIEWS = 3
CHOSEN: dict[str, dict[str, Any]] = {
    "Poisson": {},
    "random allocation": {},
    "BandMF, cyclic Poisson": {},
    "BandMF, fixed order": {},
    "BLT, fixed order": {},
    f"Poisson + {VIEWS} views": {},
}
WEIGHTS = ("last weights", "moving average", "mean of the last half")


def choices() -> Iterator[Recipe]:
    """Yields the runs by which the numbers of `CHOSEN` were chosen."""
    base = Recipe("Poisson", seed=CHOICE_SEED, held_out=True)
    for name in ("Poisson", "BandMF, cyclic Poisson", "BandMF, fixed order"):
        for passes in (4, 10):
            for rate in (4.0, 8.0, 16.0):
                yield replace(base, name=name, passes=passes, learning_rate=rate)


def grouped(found: dict[str, Any]) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """Returns the runs of each row of the table and each ε, those by which numbers were chosen left out."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for run in found.values():
        recipe = run["recipe"]
        if not recipe["held_out"]:
            name = recipe["name"] if recipe["views"] == 1 else f"{recipe['name']} + {recipe['views']} views"
            groups.setdefault((name, recipe["epsilon"]), []).append(run)
    return groups


def figure(runs: list[dict[str, Any]], weights: str) -> str:
    """Returns mean and spread in percent, with the number of runs where it is not `SEEDS`."""
    values = [100.0 * run["accuracy"][weights] for run in runs]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}" + ("" if len(values) == SEEDS else f" ({len(values)} runs)")


def page(found: dict[str, Any]) -> str:
    """Returns the tables in Markdown."""
    groups = grouped(found)
    names = [name for name in CHOSEN if any(name == each for each, _ in groups)]
    dates = sorted({run["date"] for run in found.values()})
    written = f"{dates[-1]}; torch {torch.__version__}, {platform.machine()}, one thread."
    what = (
        "Accuracy on the 10,000 test pictures in percent: mean and standard deviation over seeds (of the order; what "
        f"is drawn has none). δ = {DELTA:g}. A linear model on 3,969 scattering features (nothing of them is learned), "
        f"clip norm {CLIP_NORM}, SGD with momentum {MOMENTUM} and learning rate 8, batches of 2,048 on average, 10 "
        "passes. The noise is calibrated to each row."
    )
    lines = ["# Fashion-MNIST by sampling, noise, views and averages", ""]
    lines += [f"{written} Written by `python -m benchmarks.fashion`; do not edit.", "", what]
    for weights in WEIGHTS:
        lines += ["", f"## {weights.capitalize()}", "", "| | " + " | ".join(f"ε = {e:g}" for e in EPSILONS) + " |"]
        lines.append("|---" * (len(EPSILONS) + 1) + "|")
        for name in names:
            cells = [figure(groups[name, e], weights) if (name, e) in groups else "-" for e in EPSILONS]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "## What was run", "", "| | ε | mechanism | seconds a run (median) |", "|---|---|---|---|"]
    for name in names:
        for e in EPSILONS:
            for run in groups.get((name, e), [])[:1]:
                seconds = statistics.median(each["seconds"] for each in groups[name, e])
                lines.append(f"| {name} | {e:g} | `{short(run['mechanism'])}` | {seconds:.0f} |")
    chosen = [run for run in found.values() if run["recipe"]["held_out"]]
    if chosen:
        lines += [
            "",
            "## How the numbers were chosen",
            "",
            "5,000 training pictures that were held out, one seed, ε = 3.",
        ]
        lines += ["", "| | passes | learning rate | last weights |", "|---|---|---|---|"]
        for run in chosen:
            r = run["recipe"]
            right = 100.0 * run["accuracy"][WEIGHTS[0]]
            lines.append(f"| {r['name']} | {r['passes']} | {r['learning_rate']:g} | {right:.2f} |")
    return "\n".join(lines) + "\n"


def short(mechanism: str) -> str:
    """Returns a mechanism's text with long rows of coefficients cut, and numbers of four digits."""
    rounded = re.sub(r"\d+\.\d{5,}(?:e-?\d+)?", lambda found: f"{float(found.group()):.4g}", mechanism)
    return re.sub(r"\(((?:[\d.e-]+, ){3})(?:[\d.e-]+, )+([\d.e-]+)\)", r"(\1..., \2)", rounded)


def draw(found: dict[str, Any], picture: Path) -> None:
    """Draws accuracy against ε: one line for each row of the table, of the moving average, with every run a point."""
    groups = grouped(found)
    figure_, axes = plt.subplots(figsize=(8.0, 4.6), constrained_layout=True)
    names = [name for name in CHOSEN if any(name == each for each, _ in groups)]
    for index, name in enumerate(names):
        met = [e for e in EPSILONS if (name, e) in groups]
        places = [EPSILONS.index(e) + (index - (len(names) - 1) / 2) * 0.11 for e in met]
        values = [[100.0 * run["accuracy"]["moving average"] for run in groups[name, e]] for e in met]
        for place, runs in zip(places, values, strict=True):
            axes.plot([place] * len(runs), runs, ".", color=f"C{index}", alpha=0.45)
        axes.plot(
            places, [statistics.mean(runs) for runs in values], "_", ms=13, mew=2.2, color=f"C{index}", label=name
        )
    axes.set_xticks(range(len(EPSILONS)), [f"ε = {e:g}" for e in EPSILONS])
    axes.set_ylabel("accuracy on test pictures, %")
    axes.set_title(
        "Fashion-MNIST, linear model on fixed features, moving average of the weights\nbars: means; points: runs"
    )
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure_.savefig(picture, dpi=120)
    plt.close(figure_)


def main() -> None:
    """Makes the runs that are missing, and writes table and plot."""
    parser = argparse.ArgumentParser(description="Fashion-MNIST by several mechanisms.")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--cache", type=Path, default=Path("fashion_features"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--choose", action="store_true", help="make the runs by which numbers are chosen")
    parser.add_argument("--report", action="store_true", help="only write the table and the plot again")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so many")
    options = parser.parse_args()
    file = options.out / "fashion.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if not options.report:
        wanted = list(choices() if options.choose else recipes(CHOSEN))
        data = read(options.data, options.cache, max(each.views for each in wanted))
        begun = time.perf_counter()
        for recipe in wanted:
            if recipe.key() in found or time.perf_counter() - begun > options.seconds:
                continue
            found[recipe.key()] = trained(recipe, data) | {"date": datetime.now(UTC).date().isoformat()}
            file.write_text(json.dumps(found, indent=1))
            print(recipe, found[recipe.key()]["accuracy"], found[recipe.key()]["seconds"], flush=True)
    (options.out / "fashion.md").write_text(page(found))
    draw(found, PICTURE)


if __name__ == "__main__":
    main()
