"""What a sharpness-aware step is made of; no cluster is needed to read or to test it.

Step            one micro-batch, and the verbs in which a method is written
Engine          what it needs of whoever averages gradients and updates weights
MethodState     what a method carries from step to step
Moment          where in the training a step lies
StepStats       what a step measured
"""

from esam_dist.step.engine import Engine
from esam_dist.step.examples import Examples
from esam_dist.step.state import MethodState
from esam_dist.step.stats import Moment, StepStats
from esam_dist.step.step import Step

__all__ = ["Engine", "Examples", "MethodState", "Moment", "Step", "StepStats"]
