"""`esam-dist doctor`: what this machine lacks for training, as one table with a remedy in each row that is not ok."""

from esam_dist.doctor.command import add_arguments, run

__all__ = ["add_arguments", "run"]
