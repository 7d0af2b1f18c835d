"""How long does an honest ε take, beside the peers, and how near is it?

    python benchmarks/accounting.py --out benchmarks/results/accounting.json [--peers /path/to/venv/bin/python]

Every case of every library runs in a fresh process on one thread; the peers' may be in an environment of their own.
Times are the least and the median of several runs, in seconds; memory is the peak of the process above what it held
before the case, in MB. Where there is no answer within the limit, or none at these settings, the result says so.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 90.0
# name: (sigma, rate, steps, delta), the question that is asked of it, and the value where one is known
CASES: dict[str, tuple[str, tuple[float, float, int, float], str]] = {
    "epsilon": ("ε at σ=1, q=0.01, T=10,000, δ=1e-5", (1.0, 0.01, 10_000, 1e-5), "epsilon"),
    "calibrate": ("σ for ε=8 at q=0.01, T=10,000, δ=1e-5", (1.0, 0.01, 10_000, 1e-5), "calibrate"),
    "large": ("ε at σ=0.3, q=0.2, T=1000, δ=1e-5", (0.3, 0.2, 1000, 1e-5), "epsilon"),
    "tiny_rate": ("ε at σ=1, q=1e-5, T=1e6, δ=1e-5", (1.0, 1e-5, 10**6, 1e-5), "epsilon"),
    "phases": ("ε of 200 different phases of 50 steps", (1.0, 0.01, 50, 1e-5), "phases"),
    "one_more": ("one more step on a running ledger, and ε", (1.0, 0.01, 10_000, 1e-5), "one_more"),
}
REPEATS = {"epsilon": 15, "calibrate": 7, "large": 7, "tiny_rate": 7, "phases": 5, "one_more": 60}


def privet(question: str, sigma: float, rate: float, steps: int, delta: float) -> Callable[[], float]:
    """Returns the question as privet answers it; every call answers it afresh, but for a running ledger."""
    from privet.accounting import (
        ComposedEvent,
        GaussianEvent,
        Ledger,
        PldAccountant,
        PoissonEvent,
        SelfComposedEvent,
        calibrate_noise_multiplier,
    )

    def event(noise: float, q: float, count: int) -> SelfComposedEvent:
        return SelfComposedEvent(PoissonEvent(q, GaussianEvent(noise)), count)

    if question == "calibrate":
        return lambda: calibrate_noise_multiplier(8.0, delta, lambda noise: event(noise, rate, steps)).value
    if question == "phases":
        many = ComposedEvent(tuple(event(1 + 0.005 * i, 0.005 + 1e-4 * i, steps) for i in range(200)))
        return lambda: PldAccountant().epsilon(many, delta)
    if question == "one_more":
        ledger = Ledger()
        step = PoissonEvent(rate, GaussianEvent(sigma))
        ledger.begin(step, steps)

        def one_more() -> float:
            ledger.begin(step)
            return ledger.epsilon(delta)

        return one_more
    return lambda: PldAccountant().epsilon(event(sigma, rate, steps), delta)


def dp_accounting(question: str, sigma: float, rate: float, steps: int, delta: float) -> Callable[[], float]:
    """Returns the question as dp_accounting's PLD accountant answers it."""
    from dp_accounting import dp_event, mechanism_calibration, pld

    def event(noise: float, q: float, count: int) -> object:
        step = dp_event.PoissonSampledDpEvent(q, dp_event.GaussianDpEvent(noise))
        return dp_event.SelfComposedDpEvent(step, count)

    def epsilon(*events: object) -> float:
        accountant = pld.PLDAccountant()
        for each in events:
            accountant.compose(each)
        return float(accountant.get_epsilon(delta))

    if question == "calibrate":
        return lambda: float(
            mechanism_calibration.calibrate_dp_mechanism(
                pld.PLDAccountant, lambda noise: event(noise, rate, steps), 8.0, delta
            )
        )
    if question == "phases":
        many = [event(1 + 0.005 * i, 0.005 + 1e-4 * i, steps) for i in range(200)]
        return lambda: epsilon(*many)
    if question == "one_more":
        running = pld.PLDAccountant()
        running.compose(event(sigma, rate, steps))

        def one_more() -> float:
            running.compose(event(sigma, rate, 1))
            return float(running.get_epsilon(delta))

        return one_more
    return lambda: epsilon(event(sigma, rate, steps))


def prv_accountant(question: str, sigma: float, rate: float, steps: int, delta: float) -> Callable[[], float]:
    """Returns the question as prv_accountant answers it: the upper end of its interval, with an error of 0.01."""
    import prv_accountant as prv

    def upper(noises: list[float], rates: list[float], counts: list[int]) -> float:
        mechanisms = [
            prv.PoissonSubsampledGaussianMechanism(noise_multiplier=noise, sampling_probability=q)
            for noise, q in zip(noises, rates, strict=True)
        ]
        accountant = prv.PRVAccountant(
            prvs=mechanisms, max_self_compositions=counts, eps_error=0.01, delta_error=delta / 1e3
        )
        return float(accountant.compute_epsilon(delta=delta, num_self_compositions=counts)[2])

    if question == "phases":
        noises, rates = [1 + 0.005 * i for i in range(200)], [0.005 + 1e-4 * i for i in range(200)]
        return lambda: upper(noises, rates, [steps] * 200)
    if question == "epsilon":
        return lambda: upper([sigma], [rate], [steps])
    raise NotImplementedError(question)


LIBRARIES = {"privet": privet, "dp_accounting": dp_accounting, "prv_accountant": prv_accountant}


def measured(library: str, case: str) -> dict[str, object]:
    """Returns value, times and memory of one case, measured in this process."""
    _, arguments, question = CASES[case]
    ask = LIBRARIES[library](question, *arguments)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times, started, value = [], time.perf_counter(), 0.0
    for _ in range(REPEATS[case]):
        start = time.perf_counter()
        value = ask()
        times.append(time.perf_counter() - start)
        if time.perf_counter() - started > LIMIT / 3:
            break
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {
        "value": value if math.isfinite(value) else str(value),
        "least_s": min(times),
        "median_s": statistics.median(times),
        "runs": len(times),
        "memory_mb": round(memory, 1),
    }


def in_its_own_process(python: str, library: str, case: str) -> dict[str, object]:
    """Returns what a fresh process on one thread measured, or why it did not."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = {**os.environ, **threads, "PYTHONPATH": str(ROOT / "src"), "PYTHONWARNINGS": "ignore"}
    command = [python, str(Path(__file__).resolve()), "--one", library, case]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {"no_answer": f"within {LIMIT:.0f} s"}
    if run.returncode:
        return {"no_answer": "not at these settings"}
    found: dict[str, object] = json.loads(run.stdout.strip().splitlines()[-1])
    return found


def versions(python: str) -> dict[str, str]:
    """Returns the versions that an interpreter has installed of what matters here."""
    names = ["numpy", "scipy", "dp-accounting", "prv-accountant"]
    code = f"""
import importlib.metadata as m, json, platform
found = {{"python": platform.python_version()}}
for name in {names!r}:
    try: found[name] = m.version(name)
    except m.PackageNotFoundError: pass
print(json.dumps(found))"""
    run = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(run.stdout)
    return found


def processor() -> str:
    """Returns the name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    """Measures everything, prints a table, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"))
    parser.add_argument("--peers", default=sys.executable, help="the interpreter that has the peers")
    parser.add_argument("--one", nargs=2, metavar=("LIBRARY", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(*options.one)))
        return
    results: dict[str, dict[str, object]] = {}
    for case, (title, _, _) in CASES.items():
        rows: dict[str, object] = {"question": title}
        print(title)
        for library in LIBRARIES:
            if library == "prv_accountant" and case in {"calibrate", "one_more"}:
                continue
            found = in_its_own_process(sys.executable if library == "privet" else options.peers, library, case)
            rows[library] = found
            print(f"  {library:15} {json.dumps(found)}")
        results[case] = rows
    report = {
        "date": options.date,
        "hardware": {"processor": processor(), "cores": os.cpu_count(), "threads_used": 1},
        "load_average_at_the_end": os.getloadavg()[0],
        "versions": {"privet": versions(sys.executable), "peers": versions(options.peers)},
        "results": results,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
