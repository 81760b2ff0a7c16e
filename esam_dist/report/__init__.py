"""`esam-dist report`: one self-contained HTML page and a summary for the terminal, of one or more runs."""

from esam_dist.report.command import add_arguments, run

__all__ = ["add_arguments", "run"]
