"""Who averages gradients over ranks and updates weights: one process, DDP, or DeepSpeed, behind `step.Engine`.

MicroBatches    what an update is made of on each rank
build_engine    native (one process or DDP) or DeepSpeed, as the configuration asks
"""

from esam_dist.engine.build import MicroBatches, build_engine

__all__ = ["MicroBatches", "build_engine"]
