"""Who averages gradients over ranks and updates weights, behind one small protocol.

Engine          what ESAM needs of it
build_engine    native (one process or DDP) or DeepSpeed, as the configuration asks
"""

from esam_dist.engine.base import Engine
from esam_dist.engine.build import build_engine

__all__ = ["Engine", "build_engine"]
