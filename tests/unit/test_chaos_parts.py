"""The campaign's own rules: what it draws, what it takes for lost, what it tells."""

import random
import re
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.chaos import history
from benchmarks.chaos.report import page
from benchmarks.chaos.schedule import KINDS, schedule
from benchmarks.soak.summary import trend
from docs.tables import ROOT

BATCH, SAMPLES, RANKS = 2, 12, 2
STEP = RANKS * BATCH


def write(folder: Path, processes: list[tuple[int, int]], samples: int = SAMPLES) -> None:
    """The logs of two ranks whose processes began at an update and took so many batches, of the samples in order."""
    for rank in range(RANKS):
        taken, drawn = [], []
        for who, (start, count) in enumerate(processes):
            taken.append(f"{who} from {start * STEP}")
            # The loader is ahead of the training.
            for number in range(count + 1):
                first = (start + number) * STEP + rank * BATCH
                drawn.append(
                    f"{who} {number} {' '.join(str(place % samples) for place in range(first, first + BATCH))}"
                )
            taken += [f"{who} {number}" for number in range(count)]
        (folder / f"taken_{rank}").write_text("\n".join(taken) + "\n")
        (folder / f"drawn_{rank}").write_text("\n".join(drawn) + "\n")


def faults(folder: Path, steps: int = 6) -> list[str]:
    return history.faults(folder, RANKS, BATCH, steps, SAMPLES)


@pytest.mark.parametrize("processes", [[(0, 6)], [(0, 4), (2, 4)], [(0, 3), (0, 2), (2, 4)], [(0, 6), (6, 0)]])
def test_a_history_is_whole_where_each_process_goes_on_from_a_checkpoint(tmp_path, processes):
    write(tmp_path, processes)
    assert faults(tmp_path) == []


@pytest.mark.parametrize(
    ("processes", "told"), [([(0, 2), (3, 3)], "[8] missing"), ([(0, 5)], "[20] missing"), ([(0, 7)], "[24] too many")]
)
def test_an_update_that_is_left_out_or_too_many_is_told_by_its_position(tmp_path, processes, told):
    write(tmp_path, processes)
    assert len(faults(tmp_path)) == RANKS
    assert all(told in line for line in faults(tmp_path))


def test_a_sample_that_comes_twice_is_told(tmp_path):
    write(tmp_path, [(0, 6)])
    log = tmp_path / "drawn_1"
    log.write_text(log.read_text().replace("0 1 6 7", "0 1 6 6"))
    assert faults(tmp_path) == ["epoch 0: samples [6] twice, [7] missing"]


def test_the_position_is_that_of_the_latest_process(tmp_path):
    assert history.position(tmp_path, STEP) is None
    write(tmp_path, [(0, 5), (2, 2)])
    assert history.position(tmp_path, STEP) == history.Position("1", 2, 3)


def test_a_schedule_is_a_function_of_seed_and_job():
    drawn = [schedule(*numbers, 2, 300, list(KINDS)) for numbers in ((1, 0), (1, 0), (1, 1), (2, 0))]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2] != drawn[3] != drawn[0]


def test_a_schedule_has_every_kind_in_order_and_restarts_follow_upon_ends():
    drawn = [fault for job in range(60) for fault in schedule(1, job, 3, 300, list(KINDS))]
    assert {fault.kind for fault in drawn} == set(KINDS)
    for before, fault in pairwise(drawn):
        if fault.number:
            assert fault.at_step >= before.at_step
        if fault.kind == "restart":
            assert KINDS[before.kind].restarts
            assert fault.at_step == before.at_step
    assert {fault.rank for fault in drawn if fault.kind == "write"} == {0}
    assert {fault.kind for fault in schedule(1, 0, 2, 300, ["stop"])} == {"stop"}


def test_every_kind_is_injected():
    source = (ROOT / "benchmarks/chaos/injection.py").read_text() + (ROOT / "benchmarks/chaos/within.py").read_text()
    assert [kind for kind in KINDS if f'"{kind}"' not in source] == []


def test_the_page_counts_by_kind_and_names_what_went_wrong(tmp_path):
    (tmp_path / "faults.csv").write_text(
        "job,configuration,hosts,kind,lost_seconds,replayed_updates,survived\n"
        "0,native-2-sgd,1,stop,1.5,0,True\n0,native-2-sgd,1,stop,2.5,0,True\n1,zero1-2-sam,1,write,9,4,False\n"
    )
    (tmp_path / "jobs.csv").write_text(
        "job,configuration,hosts,seconds,undisturbed_seconds,goodput,trouble\n"
        "0,native-2-sgd,1,60,20,0.2,\n1,zero1-2-sam,1,70,21,0.3,weights differ\n"
    )
    text, failed = page(tmp_path)
    assert failed == 1
    assert "1 of 2 jobs were without any trouble" in text
    assert "3 faults in 2 jobs, 2 survived" in text
    assert re.search(r"SIGSTOP of a rank for 1 to 2 s \| 2 \| 2 \| 2.0 \(2.5\)", text)
    assert "job 1 (zero1-2-sam): weights differ" in text


@pytest.mark.parametrize(
    ("per_hour", "verdict"), [(0.0, "flat"), (2**19, "flat"), (2**24, "rises"), (2 * 2**20, "undecided")]
)
def test_a_soak_is_flat_or_rises_where_the_whole_interval_says_so(per_hour, verdict):
    rng = random.Random(0)
    series = [(seconds, 1e8 + per_hour * seconds / 3600 + rng.gauss(0, 1e5)) for seconds in range(0, 7200, 15)]
    found = trend(series)
    assert found.low < per_hour < found.high
    assert found.verdict("anonymous_bytes") == verdict


def test_a_value_that_never_moves_is_flat():
    assert trend([(seconds, 38.0) for seconds in range(100)])[2:] == (0.0, 0.0, 0.0)
