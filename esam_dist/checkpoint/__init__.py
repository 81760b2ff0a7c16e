"""Checkpoints of a run: written behind training, read back, renamed; the newest and the best are kept.

Checkpoints    the folder of them: save, find the newest sound one, find the best
Writer         saves them from a thread of its own, one at a time
read           one of them
"""

from esam_dist.checkpoint.folder import STEP, Checkpoints
from esam_dist.checkpoint.sealed import read
from esam_dist.checkpoint.writer import Outcome, Writer

__all__ = ["STEP", "Checkpoints", "Outcome", "Writer", "read"]
