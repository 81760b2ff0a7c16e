"""Starts a job on this node, waits for it, passes signals on, and returns its exit status."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from esam_dist import config
from esam_dist.launch import checks, compose, kubernetes, meet, slurm
from esam_dist.launch.arguments import Job, job
from esam_dist.launch.follow import follow, sizes
from esam_dist.launch.signals import end_on_signals
from esam_dist.watchdog import causes

log = logging.getLogger("esam_dist")

LOST = 1


def run(args: argparse.Namespace) -> int:
    """Carry out `esam-dist launch`; returns the job's exit status (128 + signal where a signal ended it).

    Raises UserError for options, configuration, data, ports, GPUs or versions that cannot work.
    """
    wanted = job(args)
    cfg = config.load(wanted.config, list(wanted.overrides))
    if wanted.launcher == "kubernetes":
        print(kubernetes.render(args, wanted, cfg), end="")  # noqa: T201
        return 0
    logs = args.logs or cfg.run.folder / "logs"
    if wanted.launcher == "slurm":
        print(slurm.render(wanted, logs, args.sbatch or []), end="")  # noqa: T201
        return 0
    facts = checks.versions(cfg)
    words = compose.command(wanted, logs, facts)
    if args.dry_run:
        print(compose.printed(wanted, words))  # noqa: T201
        return 0
    end_on_signals()
    if not args.no_checks:
        checks.check(wanted, cfg)
    checks.make_logs(logs)
    if wanted.compared and not args.no_checks:
        meet.compare(wanted, facts)
    log.info("starting %s", shlex.join(words))
    began = time.time()
    if wanted.launcher == "torchrun":
        return start_torchrun(wanted, words, lambda: causes(cfg.run.folder, began))
    status = start_deepspeed(wanted, words, logs)
    if status:
        _tell(causes(cfg.run.folder, began))
    return status


def start_torchrun(wanted: Job, words: list[str], stalls: Callable[[], list[str]] = list) -> int:
    """Run torchrun's agent in this process, which alone tells how its ranks ended.

    `stalls` tells who stood still: torchrun knows only who failed first, and that is often who waited.
    """
    from torch.distributed import DistError
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    from esam_dist.launch import agent, rendezvous

    os.environ.update(compose.environment(wanted))
    arguments = torchrun.parse_args(words[words.index("torch.distributed.run") + 1 :])  # type: ignore[no-untyped-call]
    if arguments.rdzv_backend == "c10d":
        arguments.rdzv_backend = rendezvous.register()
    agent.register()
    try:
        torchrun.run(arguments)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        _tell(stalls())
        log.error("rank %d ended with exit status %d; its log says why", rank, failure.exitcode)
        return _status(failure.exitcode)
    except (RendezvousError, DistError) as error:
        log.error("the rendezvous at %s failed: %s", wanted.meeting_point, rendezvous.explained(error))
        return LOST
    except SignalException as error:
        return 128 + error.sigval
    return 0


def start_deepspeed(wanted: Job, words: list[str], logs: Path) -> int:
    """Run the deepspeed runner in a process group of its own, and show the ranks' logs as they grow.

    The runner itself does not pass SIGTERM on, so the group gets it; the ranks then have time for a checkpoint.
    """
    over = threading.Event()
    shown = threading.Thread(target=follow, args=(logs, sizes(logs), over, sys.stdout), daemon=True)
    shown.start()
    process = subprocess.Popen(words, start_new_session=True)
    with _signals_to_group(process.pid) as received:
        status = _status_of_runner(process.wait())
        _wait_for_group(process.pid, wanted.grace_seconds)
    over.set()
    shown.join()
    return 128 + received[0] if received else status


def _tell(lines: list[str]) -> None:
    for line in lines:
        log.error("%s", line)


@contextlib.contextmanager
def _signals_to_group(group: int) -> Iterator[list[int]]:
    received: list[int] = []

    def pass_on(number: int, _: object) -> None:
        received.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_for_group(group: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(group, 0)
            time.sleep(0.2)
        os.killpg(group, signal.SIGKILL)


def _status(returncode: int) -> int:
    return 128 - returncode if returncode < 0 else returncode


def _status_of_runner(returncode: int) -> int:
    # DeepSpeed's launcher exits with -N for a rank that signal N ended, of which 256 - N arrives; 255 is ssh's own.
    number = 256 - returncode
    return 128 + number if 1 < number < signal.NSIG else _status(returncode)
