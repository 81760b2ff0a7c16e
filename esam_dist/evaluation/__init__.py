"""`esam-dist evaluate`: what a checkpoint gets right and wrong, over any number of ranks.

classes        the run's classes, and those of other data by their names
predictions    a pass over the data: what is said of each sample, gathered from all ranks
measures       accuracy by class, confusion, calibration, the worst mistakes
corruptions    the same pass over corrupted images
pictures       thumbnails
summary        for the terminal
command        one after the other
"""

from esam_dist.evaluation.command import add_arguments, run

__all__ = ["add_arguments", "run"]
