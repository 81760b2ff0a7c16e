"""`esam-dist launch`: checks, composes torchrun, deepspeed, Slurm or Kubernetes, and waits for the job."""

from esam_dist.launch.arguments import add_arguments
from esam_dist.launch.start import run

__all__ = ["add_arguments", "run"]
