"""`esam-dist launch`: checks, composes torchrun, deepspeed, Slurm or Kubernetes, and waits for the job.

And a rank ends when whoever launched it is gone (`lifeline`).
"""

from esam_dist.launch import lifeline
from esam_dist.launch.arguments import add_arguments
from esam_dist.launch.start import run

__all__ = ["add_arguments", "lifeline", "run"]
