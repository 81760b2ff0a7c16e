"""`esam-dist sharpness`: how flat the loss is around the weights of a checkpoint.

Objective        the mean loss as a function of the weights: value, gradient, Hessian-vector product
hessian          largest eigenvalues, trace
perturbed        how much the loss rises within a distance rho: m-sharpness, and along random directions
landscape        the loss along random directions, normalised by filter
measure(...)     all of it, as plain values
"""

from esam_dist.sharpness.command import add_arguments, run
from esam_dist.sharpness.measure import measure
from esam_dist.sharpness.objective import Objective

__all__ = ["Objective", "add_arguments", "measure", "run"]
