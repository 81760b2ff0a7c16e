"""Python runs this first in every process that has this folder in PYTHONPATH: in a rank it puts the faults in place."""

import os

if "ESAM_CHAOS" in os.environ and "RANK" in os.environ:
    from benchmarks.chaos.within import await_program

    await_program()
