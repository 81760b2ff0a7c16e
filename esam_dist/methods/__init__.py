"""Sharpness-aware training, one file a method: each with its source, its keys, its cost, and its step.

To add one: a file with a `Method` (or `Sharp`) of its own `name`, a line below, and a test.

method     ascent direction     weights         samples kept          update's gradient
------     ----------------     -------         ------------          -----------------
sgd        none                 -               all                   at w
sam        gradient             all             all                   at w + eps
asam       gradient, adaptive   all             all                   at w + eps
gsam       gradient             all             all                   at w + eps, less the gap's
looksam    gradient             all             all                   every k-th step at w + eps; else g + flat part
msam       momentum             all             all                   at w + eps
fsam       residual of average  all             all                   at w + eps
vasso      moving average       all             all                   at w + eps
s2sam      previous gradient    all             all                   at w + eps
esam       any direction        beta (SWP)      gamma by score (SDS)  at w + eps
recycled   any direction        all             gamma by score (SDS)  (1 - gamma) at w + gamma at w + eps
"""

from typing import Annotated

from pydantic import Field

from esam_dist.methods.asam import ASAM
from esam_dist.methods.esam import ESAM
from esam_dist.methods.fsam import FSAM
from esam_dist.methods.gsam import GSAM
from esam_dist.methods.looksam import LookSAM
from esam_dist.methods.method import Method, Phase, Setup, Sharp
from esam_dist.methods.msam import MSAM
from esam_dist.methods.recycled import Recycled
from esam_dist.methods.s2sam import S2SAM
from esam_dist.methods.sam import SAM
from esam_dist.methods.sgd import SGD
from esam_dist.methods.vasso import VaSSO

METHODS: dict[str, type[Method]] = {
    str(kind.model_fields["name"].default): kind
    for kind in (SGD, SAM, ASAM, GSAM, LookSAM, MSAM, FSAM, VaSSO, S2SAM, ESAM, Recycled)
}
"""Every method by its name."""

AnyMethod = Annotated[
    SGD | SAM | ASAM | GSAM | LookSAM | MSAM | FSAM | VaSSO | S2SAM | ESAM | Recycled, Field(discriminator="name")
]

__all__ = [
    "ASAM",
    "ESAM",
    "FSAM",
    "GSAM",
    "METHODS",
    "MSAM",
    "S2SAM",
    "SAM",
    "SGD",
    "AnyMethod",
    "LookSAM",
    "Method",
    "Phase",
    "Recycled",
    "Setup",
    "Sharp",
    "VaSSO",
]
