"""Many jobs under faults: which, one after the other or some at once, and what is written down of each."""

from __future__ import annotations

import csv
import json
import random
import shutil
import threading
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos import checks
from benchmarks.chaos.agents import Agents
from benchmarks.chaos.checks import Digests
from benchmarks.chaos.configurations import ALL, Configuration, prepare
from benchmarks.chaos.injection import inject
from benchmarks.chaos.job import Pace, Supervised, run
from benchmarks.chaos.place import Place, may_mount
from benchmarks.chaos.schedule import KINDS, Fault, schedule

FAULT_FIELDS = (
    *("job", "configuration", "hosts", "number", "kind", "rank", "amount", "update", "job_seconds"),
    *("lost_seconds", "replayed_updates", "survived", "note"),
)
JOB_FIELDS = (
    *("job", "configuration", "hosts", "updates", "faults", "not_come_about", "seconds", "undisturbed_seconds"),
    *("goodput", "starts_of_agents", "started_anew", "starts_of_ranks", "left_in_tmp", "weights", "trouble"),
)


@dataclass(frozen=True)
class Campaign:
    """Where it is written, and what is drawn."""

    out: Path
    work: Path
    seed: int
    steps: int
    kinds: tuple[str, ...]
    gaps: tuple[int, int] = (2, 5)
    configurations: tuple[Configuration, ...] = tuple(ALL)


class Records:
    """The files of a campaign: a row for each fault and each job, and the undisturbed runs."""

    def __init__(self, out: Path, *, goes_on: bool) -> None:
        self._out, self._lock = out, threading.Lock()
        out.mkdir(parents=True, exist_ok=True)
        if not goes_on:
            for name in ("faults.csv", "jobs.csv", "undisturbed.json"):
                (out / name).unlink(missing_ok=True)

    def jobs(self) -> list[dict[str, str]]:
        """The rows of the jobs that are over."""
        return read_rows(self._out / "jobs.csv")

    def undisturbed(self) -> dict[str, Any]:
        """By configuration: digests and seconds."""
        path = self._out / "undisturbed.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def add_undisturbed(self, name: str, found: dict[str, Any]) -> None:
        """Add the run of one configuration."""
        with self._lock:
            text = json.dumps(self.undisturbed() | {name: found}, indent=1, sort_keys=True)
            (self._out / "undisturbed.json").write_text(text + "\n")

    def add(self, faults: list[dict[str, Any]], job: dict[str, Any]) -> None:
        """Add a job that is over."""
        with self._lock:
            _append(self._out / "faults.csv", FAULT_FIELDS, faults)
            _append(self._out / "jobs.csv", JOB_FIELDS, [job])


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def hold(campaign: Campaign, wanted: int, at_once: int, *, goes_on: bool, minutes: float = 1e6) -> None:
    """Run jobs until `wanted` faults came about, or no job is to begin any more."""
    records, data = Records(campaign.out, goes_on=goes_on), campaign.work / "data"
    prepare(data)
    over = {int(row["job"]) for row in records.jobs()}
    came, lock, numbers = sum(int(row["faults"]) for row in records.jobs()), threading.Lock(), iter(range(10**6))
    ends = threading.Event()
    timer = threading.Timer(60 * minutes, ends.set)
    timer.daemon = True
    timer.start()
    guards = {configuration.name: threading.Lock() for configuration in campaign.configurations}

    def work(_: int) -> None:
        nonlocal came
        while not ends.is_set():
            with lock:
                if came >= wanted:
                    return
                number = next(number for number in numbers if number not in over)
            configuration = drawn(campaign, number)
            with guards[configuration.name]:
                if configuration.name not in records.undisturbed():
                    records.add_undisturbed(configuration.name, _undisturbed(campaign, configuration, data))
            row = _hurt(campaign, number, configuration, records)
            with lock:
                came += row["faults"]

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(work, range(at_once)))


def drawn(campaign: Campaign, number: int) -> Configuration:
    """The configuration of a job: all are had once before one comes again."""
    round_, place = divmod(number, len(campaign.configurations))
    order = list(campaign.configurations)
    random.Random(f"{campaign.seed} order {round_}").shuffle(order)
    return order[place]


def possible(kinds: Sequence[str], configuration: Configuration, *, mounts: bool) -> list[str]:
    """Those of `kinds` that can hit a job of this configuration on this machine."""
    has = {"": True, "root": mounts, "hosts": configuration.hosts > 1}
    return [kind for kind in kinds if has[KINDS[kind].needs]]


def _undisturbed(campaign: Campaign, configuration: Configuration, data: Path) -> dict[str, Any]:
    alone = Configuration(configuration.engine, configuration.ranks, configuration.method)
    mark = uuid.uuid4().hex
    place = Place(campaign.work / f"undisturbed_{alone.name}", mounts=may_mount())
    try:
        job = _job(alone, place, data, mark, Pace(campaign.steps, 0.0))
        run(job, [], inject)
        wrong = checks.check(place, alone, campaign.steps, mark, None)
        if wrong:
            raise RuntimeError(f"the undisturbed run of {alone.name}: {'; '.join(wrong)} (see {place.root})")
        found = checks.digests(place.run / f"checkpoints/step_{campaign.steps:08d}")
    finally:
        place.close()
    shutil.rmtree(place.root)
    return {**found._asdict(), "seconds": round(job.seconds, 1), "step_seconds": job.training_seconds / campaign.steps}


def _job(configuration: Configuration, place: Place, data: Path, mark: str, pace: Pace) -> Supervised:
    config = place.root / "config.yaml"
    config.write_text(configuration.text(data, place.run, pace.steps))
    return Supervised(configuration, place, Agents(configuration, place, config, mark), pace)


def _hurt(campaign: Campaign, number: int, configuration: Configuration, records: Records) -> dict[str, Any]:
    """One job under its schedule, checked and written down."""
    known, mounts = records.undisturbed()[configuration.name], may_mount()
    kinds = possible(campaign.kinds, configuration, mounts=mounts)
    planned = schedule(campaign.seed, number, configuration.ranks, campaign.steps, kinds, campaign.gaps)
    mark = uuid.uuid4().hex
    place = Place(campaign.work / f"job_{number:03d}_{configuration.name}", mounts=mounts, hosts=configuration.hosts)
    job = _job(configuration, place, campaign.work / "data", mark, Pace(campaign.steps, known["step_seconds"]))
    try:
        run(job, planned, inject)
        expected = Digests(known["weights"], known["state"])
        lost = checks.check(place, configuration, campaign.steps, mark, expected)
        wrong = [*job.troubles, *lost]
        row = _row(number, job, planned, wrong, known)
        records.add([_fault_row(number, job, struck, is_whole=not lost) for struck in job.struck], row)
    finally:
        job.agents.kill()
        place.close()
    if not wrong:
        shutil.rmtree(place.root)
    print(_line(row), flush=True)
    return row


def _fault_row(number: int, job: Supervised, struck: Any, *, is_whole: bool) -> dict[str, Any]:
    fault: Fault = struck.fault
    return {
        "job": number,
        "configuration": job.configuration.name,
        "hosts": job.configuration.hosts,
        **{name: value for name, value in fault._asdict().items() if name != "at_step"},
        "update": struck.high,
        "job_seconds": round(struck.seconds, 2),
        "lost_seconds": round(struck.lost_seconds, 2),
        "replayed_updates": struck.replayed_steps,
        "survived": struck.survived and is_whole,
        "note": struck.note,
    }


def _row(number: int, job: Supervised, planned: list[Fault], wrong: list[str], known: dict[str, Any]) -> dict[str, Any]:
    logs = job.place.logs
    useful = job.pace.steps * job.pace.step_seconds
    return {
        "job": number,
        "configuration": job.configuration.name,
        "hosts": job.configuration.hosts,
        "updates": job.pace.steps,
        "faults": len(job.struck),
        "not_come_about": len(planned) - len(job.struck),
        "seconds": round(job.seconds, 1),
        "undisturbed_seconds": known["seconds"],
        "goodput": round(useful / job.seconds, 3),
        "starts_of_agents": job.agents.starts,
        "started_anew": job.started_anew,
        "starts_of_ranks": sum(1 for _ in logs.rglob("attempt_*")),
        "left_in_tmp": sum(1 for _ in job.place.temporary.iterdir()),
        "weights": known["weights"][:16],
        "trouble": "; ".join(wrong),
    }


def _line(row: dict[str, Any]) -> str:
    verdict = row["trouble"] or "equal to the undisturbed run"
    return f"job {row['job']} {row['configuration']}: {row['faults']} faults in {row['seconds']} s: {verdict}"


def _append(path: Path, fields: Sequence[str], rows: list[dict[str, Any]]) -> None:
    begins = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields)
        if begins:
            writer.writeheader()
        writer.writerows(rows)


def described(campaign: Campaign) -> dict[str, Any]:
    """The campaign's settings, for its report."""
    told = asdict(campaign)
    return {name: told[name] for name in ("seed", "steps", "gaps")} | {"kinds": list(campaign.kinds)}
