"""Starts gloo ranks for a test, and brings back what each of them returned, or how it failed.

The processes come from a fork server that has loaded torch once, so that a scenario costs a second and not the import
of torch in every rank. One scenario runs many checks inside, and the test functions look at what it returned.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

PATIENCE = 100.0
"""Seconds after which a scenario counts as hanging. Machines under load are slow; a hang is for ever."""


def _child(scenario, rank, world, folder, arguments, channel, initialize, timeout):  # noqa: PLR0917
    import torch
    import torch.distributed as dist

    os.environ.pop("WORLD_SIZE", None)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*barrier.*")
    warnings.filterwarnings("ignore", message="the noise multiplier is 0")  # as in pyproject.toml
    try:
        if initialize:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/rendezvous",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=timeout),
            )
        torch.manual_seed(100 + rank)  # ranks are not alike by accident
        # By plain pickle: torch would send the tensors as shared memory, of a process that is about to end.
        channel.send_bytes(pickle.dumps((True, scenario(rank, world, Path(folder), *arguments))))
    except BaseException:  # noqa: BLE001 - whatever it is, the test shows it
        channel.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        channel.close()
        # What is left of a group whose rank was killed must not keep this process from ending.
        os._exit(0)


class Ranks:
    """The results of a scenario by rank: what it returned, or in `failed` the traceback; neither if it was killed."""

    def __init__(self, world):
        self.results = [None] * world
        self.failed = [None] * world
        self.seconds = 0.0


def start(scenario, *arguments, world=2, initialize=True, timeout=60.0, patience=PATIENCE):
    """Runs `scenario(rank, world, folder, *arguments)` on every rank, and returns what became of each."""
    context = multiprocessing.get_context("forkserver")
    # What torch would load late, at the first optimizer, included.
    context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "privet.engine", "privet.step"])
    found = Ranks(world)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        processes, channels = [], []
        for rank in range(world):
            here, there = context.Pipe(duplex=False)
            process = context.Process(
                target=_child,
                args=(scenario, rank, world, folder, arguments, there, initialize, timeout),
                daemon=False,  # a loader may start workers
            )
            process.start()
            there.close()
            processes.append(process)
            channels.append(here)
        try:
            open_channels = dict(zip(channels, range(world), strict=True))
            while open_channels:
                left = patience - (time.monotonic() - begun)
                ready = wait(list(open_channels), timeout=max(left, 0.0))
                assert ready, f"ranks {sorted(open_channels.values())} hang"
                for channel in ready:
                    rank = open_channels.pop(channel)
                    try:
                        good, value = pickle.loads(channel.recv_bytes())
                    except EOFError:
                        processes[rank].join()
                        if processes[rank].exitcode != -signal.SIGKILL:  # a scenario may kill its own rank
                            found.failed[rank] = f"it ended with status {processes[rank].exitcode}"
                        continue
                    (found.results if good else found.failed)[rank] = value
        finally:
            for process in processes:
                process.kill()
                process.join()
    found.seconds = time.monotonic() - begun
    return found


def run(scenario, *arguments, world=2, **options):
    """Returns what the scenario returned on each rank; an error on one of them is an error here."""
    found = start(scenario, *arguments, world=world, **options)
    broken = [f"rank {rank}:\n{text}" for rank, text in enumerate(found.failed) if text]
    assert not broken, "\n".join(broken)
    return found.results
