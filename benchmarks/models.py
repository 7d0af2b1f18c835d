"""What does a private step of a model that people train cost, beside the same step without privacy?

    python -m benchmarks.models --out benchmarks/results                 every model, then the table (ten minutes)
    python -m benchmarks.models --out benchmarks/results --code NAME     the same, as one more column of this name
    python -m benchmarks.models --model "GPT-2"                          one model, as one line of JSON

It needs transformers and peft. Each model runs in a process of its own. A private step (through the paper's door) and a
step without privacy alternate, with the same data and separate models, and the ratio is the median over the pairs:
whatever else the machine does falls on both. The data loader is left out: the batch is fixed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.architectures import ARCHITECTURES, Inputs
from benchmarks.spine import machine
from benchmarks.spine_cell import LEARNING_RATE, Step, time_pairs

__all__ = ["measured"]

SEED, BATCH = 0, 16
Row = dict[str, Any]


def loss(output: Tensor) -> Tensor:
    """Returns the mean over the examples of each one's mean square."""
    return output.flatten(1).square().mean(1).mean()


def steps_of(model: nn.Module, inputs: Inputs, *, private: bool) -> Step:
    """Returns a step of the model on one batch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.SGD(trained, lr=LEARNING_RATE)
    if private:
        from privet import PrivacyEngine

        PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            data_loader=DataLoader(TensorDataset(*inputs), batch_size=len(inputs[0])),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )

    def step() -> None:
        optimizer.zero_grad()
        loss(model(*inputs)).backward()
        optimizer.step()

    return step


def measured(name: str, *, seconds: float) -> Row:
    """Returns one model's measurement."""
    made = []
    for private in (False, True):
        torch.manual_seed(SEED)
        model, inputs = ARCHITECTURES[name]()
        torch.manual_seed(SEED)
        made.append(steps_of(model, inputs(BATCH), private=private))
    plain, private_step = made
    return {"model": name, **time_pairs(plain, private_step, seconds=seconds)}


def report(about: Row, rows: list[Row]) -> str:
    """Returns the page."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if name != "opacus")
    codes = list(dict.fromkeys(row["code"] for row in rows))
    found = {(row["model"], row["code"]): row for row in rows}
    lines = [f"| model | {' | '.join(codes)} | ms without privacy |", "|---" * (2 + len(codes)) + "|"]
    for name in ARCHITECTURES:
        mine = [found.get((name, code)) for code in codes]
        if not any(mine):
            continue
        shown = [
            "-" if row is None else row.get("failed") or "{ratio:.2f} ({ratio_low:.2f}-{ratio_high:.2f})".format(**row)
            for row in mine
        ]
        last = next(row for row in reversed(mine) if row is not None)
        lines.append(f"| {name} | {' | '.join(shown)} | {last.get('floor_ms', 0.0):.0f} |")
    table = "\n".join(lines)
    return f"""# What a private step of known architectures costs

{about["date"]}; {about["processor"]}, {about["cores"]} cores, {about["memory_gib"]} GiB; {about["threads"]} threads; \
Python {about["python"]}, {versions}; seed {about["seed"]}, {BATCH} examples. {about["note"]} Written by \
`python -m benchmarks.models`; do not edit.

Median ratios of a private step to the same step without privacy, with quartiles; steps of both alternate in one
process. Width 256, 2 layers, 128 positions, random weights, dropout as the configurations have it.

{table}
"""


def run(name: str, *, seconds: float, threads: int) -> Row:
    """Returns the measurement of one model, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.models", "--model", name]
    command += ["--seconds", str(seconds), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"model": name, "failed": done.stderr.strip().splitlines()[-1][:200]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def all_models(out: Path, options: argparse.Namespace) -> None:
    """Measures every model under the name of this code, and writes file and page after each."""
    held, page = out / "models.json", out / "models.md"
    rows: list[Row] = json.loads(held.read_text(encoding="utf-8"))["rows"] if held.exists() else []
    for name in options.models or ARCHITECTURES:
        rows = [row for row in rows if (row["model"], row["code"]) != (name, options.code)]
        rows.append({"code": options.code, **run(name, seconds=options.seconds, threads=options.threads)})
        print(json.dumps(rows[-1]), flush=True)
        about = {**machine(), "threads": options.threads, "seed": SEED, "note": options.note}
        about["versions"].update({each: metadata.version(each) for each in ("transformers", "peft")})
        held.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        page.write_text(report(about, rows), encoding="utf-8")


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for models.json and models.md")
    parser.add_argument("--code", default="now", help="the name of the column")
    parser.add_argument("--note", default="", help="a sentence about the machine, for the page")
    parser.add_argument("--model", choices=ARCHITECTURES)
    parser.add_argument("--models", nargs="*", choices=ARCHITECTURES, help="with --out: these alone")
    parser.add_argument("--seconds", type=float, default=6.0, help="about how long to time pairs")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.out is None:
        print(json.dumps(measured(options.model, seconds=options.seconds)))
    else:
        all_models(options.out, options)


if __name__ == "__main__":
    main()
