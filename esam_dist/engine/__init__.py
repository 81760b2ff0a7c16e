"""Who averages gradients over ranks and updates weights: one process, DDP, or DeepSpeed, behind `step.Engine`.

build_engine    native (one process or DDP) or DeepSpeed, as the configuration asks
"""

from esam_dist.engine.build import build_engine

__all__ = ["build_engine"]
