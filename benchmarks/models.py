"""What does a private step of a model that people train cost, beside the same step without privacy?

    python -m benchmarks.models --out benchmarks/results                 every model, then the table (ten minutes)
    python -m benchmarks.models --out benchmarks/results --code NAME     the same, as one more column of this name
    python -m benchmarks.models --out benchmarks/results --peer opacus   steps of a peer that is installed
    python -m benchmarks.models --model "GPT-2"                          one model, as one line of JSON

It needs transformers and peft. Each model runs in a process of its own. A private step (through the paper's door) and a
step without privacy alternate, with the same data and separate models, and the ratio is the median over the pairs:
whatever else the machine does falls on both. The data loader is left out: the batch is fixed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import warnings
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.architectures import ARCHITECTURES, Inputs
from benchmarks.spine import machine
from benchmarks.spine_cell import LEARNING_RATE, Step, time_pairs, timed

__all__ = ["measured"]

SEED, BATCH = 0, 16
Row = dict[str, Any]
TRIED = """Tried, and slower, on the same machine:

* Rows of DeBERTa's tables of positions (65,536 entries) one by one: 49 to 60 ms for each table, against 23 to 53 ms by
  vmap. So the limit for vmap is 131,072 entries now.
* The norms of a depthwise kernel (16 x 64 x 16 x 16, 7 x 7): a product of one row for each channel 20 to 22 ms, this
  with a seventh of the copies 20 ms, one convolution with 1,024 groups 43 ms, products over channels that lie innermost
  21 ms, the kernel's shifts one by one 26 ms; place by place 9 to 11 ms. For 3 x 3 kernels place by place loses (61 ms
  against 27 ms for 16 x 128 x 32 x 32), and one convolution with 2,048 groups would take 8 ms: not done.
* Noise of DLRM's 1.37 million values takes 33 ms in runs of 2^17 values, 28 ms in 2^18, 40 ms in 2^16, 55 ms in 2^15
  (`torch.randn`: 14 ms), at a load of 11. It is most of what DLRM pays.
"""
"""What was measured once by hand, so that nobody tries it again without a reason."""


def loss(output: Tensor) -> Tensor:
    """Returns the mean over the examples of each one's mean square."""
    return output.flatten(1).square().mean(1).mean()


def steps_of(model: nn.Module, inputs: Inputs, *, private: bool, peer: str | None = None) -> Step:
    """Returns a step of the model on one batch; a private one is privet's, or a peer's."""
    if private and peer is not None:  # layers that it has a stand-in for
        model = importlib.import_module(f"{peer}.validators").ModuleValidator.fix(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.SGD(trained, lr=LEARNING_RATE)
    if private:
        from privet import PrivacyEngine

        options: dict[str, Any] = {
            "module": model,
            "optimizer": optimizer,
            "data_loader": DataLoader(TensorDataset(*inputs), batch_size=len(inputs[0])),
            "noise_multiplier": 1.0,
            "max_grad_norm": 1.0,
        }
        if peer is None:
            PrivacyEngine().make_private(**options)
        else:
            engine = importlib.import_module(peer).PrivacyEngine()
            model, optimizer, _ = engine.make_private(**options, poisson_sampling=False)

    def step() -> None:
        optimizer.zero_grad()
        loss(model(*inputs)).backward()
        optimizer.step()

    return step


def measured(name: str, *, seconds: float, peer: str | None = None) -> Row:
    """Returns one model's measurement, and how long as many normal values take as it has parameters."""
    made = []
    for private in (False, True):
        torch.manual_seed(SEED)
        model, inputs = ARCHITECTURES[name]()
        torch.manual_seed(SEED)
        made.append(steps_of(model, inputs(BATCH), private=private, peer=peer))
    plain, private_step = made
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = time_pairs(plain, private_step, seconds=seconds)
    normals = 1e3 * statistics.median(timed(partial(torch.randn, count)) for _ in range(7))
    return {"model": name, "peer": peer, **found, "normals_ms": normals}


def report(about: Row, rows: list[Row]) -> str:
    """Returns the page."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if name != "opacus")
    codes = list(dict.fromkeys(row["code"] for row in rows))
    found = {(row["model"], row["code"]): row for row in rows}
    lines = [f"| model | {' | '.join(codes)} | beside plain and normals | plain, ms |", "|---" * (3 + len(codes)) + "|"]
    for name in ARCHITECTURES:
        mine = [found.get((name, code)) for code in codes]
        timed_rows = [row for row in mine if row is not None and "ratio" in row]
        if not timed_rows:
            continue
        ours = [row for row in timed_rows if "normals_ms" in row and row["peer"] is None]
        shown = [*map(_ratio, mine), "-", f"{timed_rows[-1]['floor_ms']:.0f}"]
        if ours:
            row = ours[-1]
            shown[-2] = f"{row['ratio'] * row['floor_ms'] / (row['floor_ms'] + row['normals_ms']):.2f}"
        lines.append(f"| {name} | {' | '.join(shown)} |")
    table = "\n".join(lines)
    errors = [f"* {row['model']}, {row['code']}: `{row['failed']}`" for row in rows if "failed" in row]
    failed = "\n".join(["What did not run, with the last line of the error:", "", *errors, "", ""]) if errors else ""
    return f"""# What a private step of known architectures costs

{about["date"]}; {about["processor"]}, {about["cores"]} cores, {about["memory_gib"]} GiB; {about["threads"]} threads; \
Python {about["python"]}, {versions}; seed {about["seed"]}, {BATCH} examples. {about["note"]} Written by \
`python -m benchmarks.models`; do not edit.

Median ratios of a private step to the same step without privacy, with quartiles; steps of both alternate in one
process. Width 256, 2 layers, 128 positions, random weights, dropout as the configurations have it. *Beside plain and
normals* is the last column of privet's over a plain step and one `torch.randn` of as many values as there are
parameters, which no private step can do without. A peer's model has its own stand-ins for layers where it has some.

{table}

{failed}{TRIED}"""


def _ratio(row: Row | None) -> str:
    if row is None:
        return "-"
    return "does not run" if "failed" in row else "{ratio:.2f} ({ratio_low:.2f}-{ratio_high:.2f})".format(**row)


def run(name: str, *, seconds: float, threads: int, peer: str | None) -> Row:
    """Returns the measurement of one model, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.models", "--model", name]
    command += ["--seconds", str(seconds), "--threads", str(threads)]
    command += [] if peer is None else ["--peer", peer]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"model": name, "peer": peer, "failed": done.stderr.strip().splitlines()[-1][:120]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def all_models(out: Path, options: argparse.Namespace) -> None:
    """Measures every model under the name of this code, and writes file and page after each."""
    held, page = out / "models.json", out / "models.md"
    rows: list[Row] = json.loads(held.read_text(encoding="utf-8"))["rows"] if held.exists() else []
    for name in options.models or ARCHITECTURES:
        rows = [row for row in rows if (row["model"], row["code"]) != (name, options.code)]
        row = run(name, seconds=options.seconds, threads=options.threads, peer=options.peer)
        rows.append({"code": options.code, **row})
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
    parser.add_argument("--peer", help="a package with a PrivacyEngine, whose steps are timed in place of privet's")
    parser.add_argument("--model", choices=ARCHITECTURES)
    parser.add_argument("--models", nargs="*", choices=ARCHITECTURES, help="with --out: these alone")
    parser.add_argument("--seconds", type=float, default=6.0, help="about how long to time pairs")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.out is None:
        print(json.dumps(measured(options.model, seconds=options.seconds, peer=options.peer)))
    else:
        all_models(options.out, options)


if __name__ == "__main__":
    main()
