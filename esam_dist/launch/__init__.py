"""`esam-dist launch`: checks, composes torchrun, deepspeed, Slurm or Kubernetes, and waits for the job.

And what a rank owes whoever launched it: to end when it is gone (`lifeline`), and to say a mistake once (`mistake`).
"""

from esam_dist.launch import lifeline, mistake
from esam_dist.launch.arguments import add_arguments
from esam_dist.launch.start import run

__all__ = ["add_arguments", "lifeline", "mistake", "run"]
