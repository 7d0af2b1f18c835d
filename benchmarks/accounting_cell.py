"""One library's answers to the questions of the accounting benchmark, each measured in a process of its own.

    python -m benchmarks.accounting_cell LIBRARY        one question a line in, one answer a line out, as JSON

The process imports the library once. Each question is answered in a fork of it, so that the import is not measured,
nothing that one question left behind helps the next, and a question past its limit can be ended. Times and limits are
those of the processor, since others share the machine; on one thread they are what a clock shows on a free one.
"""

from __future__ import annotations

import json
import math
import os
import resource
import select
import signal
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

Answer = dict[str, float]
Ask = Callable[[], Answer]
WAIT = 8  # seconds waited for each second of processor time that a question may take: others share the machine
MEMORY = 6 * 2**30  # bytes of data a process may hold; above it the question counts as not answered


def privet(method: str, question: dict[str, Any]) -> Ask:
    """Returns the question as privet answers it."""
    from privet.accounting import (
        ComposedEvent,
        GaussianEvent,
        Ledger,
        PldAccountant,
        PoissonEvent,
        SelfComposedEvent,
        calibrate_noise_multiplier,
        get_accountant,
        register_accountant,
    )

    rate, steps, delta = question["rate"], question["steps"], question["delta"]

    def event(noise: float) -> SelfComposedEvent:
        return SelfComposedEvent(PoissonEvent(rate, GaussianEvent(noise)), steps)

    if method == "calibrate":
        calls = [0, 0]

        class Counted(PldAccountant):
            def bound_epsilon(self, *args: Any, **options: Any) -> Any:
                calls[0] += 1
                return super().bound_epsilon(*args, **options)

        def built(noise: float) -> SelfComposedEvent:
            calls[1] += 1
            return event(noise)

        register_accountant("counted", Counted)

        def sigma() -> Answer:
            calls[:] = 0, 0
            found = calibrate_noise_multiplier(question["target"], delta, built, accountant="counted")
            return {"sigma": found.value, "calls": calls[0], "quick_calls": calls[1] - calls[0]}

        return sigma
    if method == "schedule":
        many = ComposedEvent(tuple(PoissonEvent(rate, GaussianEvent(1 + 0.005 * i)) for i in range(steps)))
        return lambda: {"epsilon": PldAccountant().epsilon(many, delta)}
    if method == "one_more":
        ledger, step = Ledger(), PoissonEvent(rate, GaussianEvent(question["sigma"]))
        ledger.begin(step, steps)
        ledger.epsilon(delta)

        def one_more() -> Answer:
            ledger.begin(step)
            return {"epsilon": ledger.epsilon(delta)}

        return one_more
    whole = event(question["sigma"])
    if method == "bounds":

        def both() -> Answer:
            bound = get_accountant("pld").epsilon_bounds(whole, delta)
            return {"epsilon": bound.upper, "lower": bound.lower}

        return both
    return lambda: {"epsilon": get_accountant(method).epsilon(whole, delta)}


def dp_accounting(method: str, question: dict[str, Any]) -> Ask:
    """Returns the question as dp_accounting answers it. `method` may be a spacing of its loss grid."""
    from dp_accounting import dp_event, mechanism_calibration, pld

    rate, steps, delta = question["rate"], question["steps"], question["delta"]
    if method in {"calibrate", "schedule", "one_more"}:

        def event(noise: float, count: int) -> object:
            step = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise))
            return dp_event.SelfComposedDpEvent(step, count)

        if method == "calibrate":
            calls = [0]

            def built(noise: float) -> object:
                calls[0] += 1
                return event(noise, steps)

            def sigma() -> Answer:
                calls[0] = 0
                target = question["target"]
                found = mechanism_calibration.calibrate_dp_mechanism(pld.PLDAccountant, built, target, delta)
                return {"sigma": float(found), "calls": calls[0]}

            return sigma
        running = pld.PLDAccountant()
        if method == "one_more":
            running.compose(event(question["sigma"], steps))

        def composed() -> Answer:
            accountant = running if method == "one_more" else pld.PLDAccountant()
            for noise in [question["sigma"]] if method == "one_more" else [1 + 0.005 * i for i in range(steps)]:
                accountant.compose(event(noise, 1))
            return {"epsilon": float(accountant.get_epsilon(delta))}

        return composed

    def epsilon() -> Answer:
        upper = method != "lower"
        one = pld.privacy_loss_distribution.from_gaussian_mechanism(
            question["sigma"],
            pessimistic_estimate=upper,
            use_connect_dots=upper,
            value_discretization_interval=float(method) if upper else 1e-4,
            sampling_prob=rate,
        )
        return {"epsilon": float(one.self_compose(steps).get_epsilon_for_delta(delta))}

    return epsilon


def opacus(method: str, question: dict[str, Any]) -> Ask:
    """Returns the question as Opacus answers it; a calibration is that of its `make_private_with_epsilon`."""
    from opacus.accountants import create_accountant
    from opacus.accountants.utils import get_noise_multiplier

    rate, steps, delta = question["rate"], question["steps"], question["delta"]
    if method.startswith("calibrate"):
        accountant = method.removeprefix("calibrate ")
        kind = type(create_accountant(accountant))
        calls, plain = [0], kind.get_epsilon

        def counted(self: Any, *args: Any, **options: Any) -> Any:
            calls[0] += 1
            return plain(self, *args, **options)

        kind.get_epsilon = counted

        def sigma() -> Answer:
            calls[0] = 0
            found = get_noise_multiplier(
                target_epsilon=question["target"],
                target_delta=delta,
                sample_rate=rate,
                steps=steps,
                accountant=accountant,
            )
            return {"sigma": float(found), "calls": calls[0]}

        return sigma

    def epsilon() -> Answer:
        accountant = create_accountant(method)
        accountant.history = [(question["sigma"], rate, steps)]
        return {"epsilon": float(accountant.get_epsilon(delta))}

    return epsilon


def prv_accountant(method: str, question: dict[str, Any]) -> Ask:
    """Returns the question as prv_accountant answers it: both ends of its interval, with an error of 0.01 in ε."""
    import prv_accountant as prv

    def epsilon() -> Answer:
        step = prv.PoissonSubsampledGaussianMechanism(
            noise_multiplier=question["sigma"], sampling_probability=question["rate"]
        )
        steps, delta = [question["steps"]], question["delta"]
        accountant = prv.PRVAccountant([step], max_self_compositions=steps, eps_error=0.01, delta_error=delta / 1e3)
        low, _, high = accountant.compute_epsilon(delta=delta, num_self_compositions=steps)
        return {"epsilon": float(high), "lower": float(low)}

    if method != "interval":
        raise NotImplementedError(method)
    return epsilon


def oracle(method: str, question: dict[str, Any]) -> Ask:
    """Returns the question as the tests' oracle answers it, which shares no code with privet's accountants."""
    from benchmarks.accounting_reference import enclosed

    return lambda: enclosed(question, float(method))


LIBRARIES: dict[str, Callable[[str, dict[str, Any]], Ask]] = {
    "privet": privet,
    "dp_accounting": dp_accounting,
    "opacus": opacus,
    "prv_accountant": prv_accountant,
    "oracle": oracle,
}


def measured(library: str, method: str, question: dict[str, Any], limit: float, repeats: int) -> dict[str, object]:
    """Returns answer, times and memory of one question, measured in this process; repeats end when they take long."""
    ask = LIBRARIES[library](method, question)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times: list[float] = []
    answer: Answer = {}
    while len(times) < repeats and sum(times) < 0.3:
        start = time.process_time()
        answer = ask()
        times.append(time.process_time() - start)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    held: dict[str, object] = {name: value if math.isfinite(value) else str(value) for name, value in answer.items()}
    return {**held, "seconds": statistics.median(times), "runs": len(times), "memory_mib": round(memory, 1)}


def forked(library: str, asked: dict[str, Any]) -> dict[str, object]:
    """Returns what a fork of this process measured, or why there is no answer."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (asked["limit"], asked["limit"]))  # a fork starts at 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        try:
            found = measured(library, asked["method"], asked["question"], asked["limit"], asked["repeats"])
        except MemoryError:
            found = {"no_answer": f"needs more than {MEMORY / 2**30:.0f} GiB"}
        except BaseException as error:  # noqa: BLE001  every end of a peer is a result
            found = {"no_answer": f"{type(error).__name__}: {str(error)[:120]}"}
        os.write(writer, json.dumps(found).encode())
        os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], WAIT * asked["limit"])
    if not ready:
        os.kill(child, signal.SIGKILL)
    text = os.read(reader, 1 << 16)  # empty where the process was ended, by us or by its limit
    os.close(reader)
    os.waitpid(child, 0)
    if not text:
        return {"no_answer": f"within {asked['limit']} s"}
    answer: dict[str, object] = json.loads(text)
    return answer


def main() -> None:
    """Answers questions from standard input until it ends."""
    library = sys.argv[1]
    easy = {"sigma": 1.0, "rate": 0.01, "steps": 100, "delta": 1e-5, "target": 1.0}
    warm = {"privet": ["pld", "rdp"], "dp_accounting": ["1e-3"], "opacus": ["rdp", "prv"]}
    for method in warm.get(library, []):
        LIBRARIES[library](method, easy)()  # what the library imports or prepares on first use is in every fork
    for line in sys.stdin:
        print(json.dumps(forked(library, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
