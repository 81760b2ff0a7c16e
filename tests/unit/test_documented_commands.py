"""Every command of the pages can be run as it is told; one that no test could run says why (tests/documented.py)."""

import pytest

from docs import tables
from tests.documented import assert_wrong, check, commands

ALL = [command for page in tables.pages() for command in commands(str(page.relative_to(tables.ROOT)), page.read_text())]


@pytest.mark.parametrize("command", ALL, ids=lambda command: f"{command.place} {' '.join(command.words)[:60]}")
def test_a_command_of_the_pages_can_be_run_as_it_is_told(command):
    check(command)


def test_the_commands_of_the_first_page_are_among_them():
    told = [" ".join(command.words) for command in ALL if command.place.startswith("README.md")]
    assert any(line.startswith("esam-dist prepare folder") for line in told)
    assert any(line.startswith("make train") for line in told)
    assert len(ALL) > 40


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ("esam-dist train configs/nothing.yaml", "there is no configs/nothing.yaml"),
        ("esam-dist train configs/digits_esam.yaml method.nme=sam", "method.nme"),
        ("torchrun --standalone \\\n  -m esam_dist train configs/digits_esam.yaml train.epochs=many", "train.epochs"),
        ("torchrun --nproc 2 -m esam_dist train CONFIG --fast", "not understood"),
        ("torchrun train.py", "without `-m esam_dist`"),
        ("OMP_NUM_THREADS=1 python -m esam_dist prepare foldr out", "not understood"),
        ("esam-dist evaluate runs/x --avraged", "not understood"),
        ("make tables && make tabels", "no tabels"),
        ("python -m benchmarks.nothing", "there is no module benchmarks.nothing"),
        ("python -m benchmarks.data --imges 3", "not understood"),
        ("python -m benchmarks.data.shuffle --fast", "takes no arguments"),
        ("pip install 'esam-dist[wadb]'", "there is no extra wadb"),
        ("esam-dist launch --with slurm CONFIG > x\nsbatch x", "sbatch is no program of ours"),
    ],
)
def test_a_wrong_command_is_found(block, told):
    last = block.replace("\\\n", "").replace("&&", "\n").splitlines()[-1]
    assert_wrong(f"```\n{last}\n```\n", told)


def test_a_command_within_a_line_is_found_too():
    assert_wrong("Say `esam-dist trian CONFIG`.", "not understood")
    assert not [*commands("page.md", "Say `esam-dist launch [options] CONFIG` or `torchrun ...`.")]


@pytest.mark.parametrize(
    ("mark", "told"),
    [
        ("<!-- run by tests/unit/test_nothing.py -->", "there is no test"),
        ("<!-- run by tests/unit/test_readme.py::test_nothing -->", "there is no test"),
        ("<!-- run sometimes -->", "neither"),
        ("<!-- any comment -->", "no program of ours"),
    ],
)
def test_a_mark_names_a_test_that_there_is_or_a_reason(mark, told):
    assert_wrong(f"{mark}\n```sh\nsbatch x\n```\n", told)


@pytest.mark.parametrize("mark", ["not run: needs a cluster", "run by tests/unit/test_readme.py"])
def test_a_marked_block_may_hold_programs_of_others_but_ours_are_checked_in_it(mark):
    good, bad = (f"<!-- {mark} -->\n```\n{line}\n```\n" for line in ("sbatch x", "esam-dist trian CONFIG"))
    (command,) = commands("page.md", good)
    check(command)
    assert_wrong(bad, "not understood")
