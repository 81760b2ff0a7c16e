"""All ranks of a run in one process, in float64, by the formulas of the papers and plain autograd.

Nothing of the package computes here; only what is drawn at random (which tensors, which masks) is taken from it, as
data. A replica's weights are a dictionary; nothing is perturbed in place, nothing is restored.

weights      arithmetic of dictionaries of tensors
rank         one replica and its batch: passes, dropout, BatchNorm's statistics
world        all replicas in one micro-batch, with perturbations of their own or one for all
ascent       where a method climbs, and how far
choice       from scores to the samples kept, by sorting lists
selection    scores, and the descent of the samples kept
methods      one function a method
training     the optimizer over all of it

Shapes: W ranks, B samples per rank.
"""

from tests.multiprocess.simulation.training import Simulation

__all__ = ["Simulation"]
