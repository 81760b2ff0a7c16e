"""`esam-dist prepare SOURCE OUT`: any source of labelled images becomes shards with an index."""

from esam_dist.data.prepare.command import add_arguments, run
from esam_dist.data.prepare.digits import prepare_digits

__all__ = ["add_arguments", "prepare_digits", "run"]
