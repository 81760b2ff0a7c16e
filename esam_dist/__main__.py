"""`python -m esam_dist`: the same commands as `esam-dist`, and what torchrun and deepspeed start on every rank."""

from esam_dist import launch  # noqa: F401  first: a rank notes its launcher before torch is imported
from esam_dist.cli import program

if __name__ == "__main__":
    program()
