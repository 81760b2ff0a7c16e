"""What one step does: the method's configuration, with its schedules read at one point of the run.

Every method is one choice for each of four questions:

method    ascent direction     weights         samples kept          descent gradient
------    ----------------     -------         ------------          ----------------
sgd       none                 -               all                   at w
sam       gradient             all             all                   at w + eps
asam      gradient, adaptive   all             all                   at w + eps
gsam      gradient             all             all                   at w + eps, less the gap's
looksam   gradient             all             all                   every k-th step at w + eps; else g + flat part
msam      momentum             all             all                   at w + eps
esam      gradient             beta (SWP)      gamma by score (SDS)  at w + eps, or mixed with the recycled gradient
"""

from __future__ import annotations

from dataclasses import dataclass

from esam_dist import config
from esam_dist.perturb import radius


@dataclass(frozen=True)
class Rule:
    """One step, resolved. A radius of 0 is a plain step."""

    name: str = "sgd"
    rho: float = 0.0
    """Radius as configured; `radius` has the scale of SWP in it."""
    beta: float = 1.0
    gamma: float = 1.0
    radius: float = 0.0
    adaptive_eta: float | None = None
    """ASAM's eta; None: the ball is plain."""
    swp: str = "tensor"
    score: str = "forward"
    scope: str = "rank"
    transport: str = "scores"
    num_quantiles: int = 16
    capacity_factor: float = 0.0
    descent: str = "kept"
    """`kept`, `recycled`, `recycled_exact`, `gsam` or `looksam`."""
    alpha: float = 0.0
    """GSAM's or LookSAM's."""
    reuses: bool = False
    """LookSAM between two perturbations."""
    label_smoothing: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether this is a step of the base optimizer alone."""
        return self.radius == 0.0

    @staticmethod
    def at(cfg: config.Config, *, step: int, epoch: float) -> Rule:
        """The rule of update `step` (counted from 0), which begins at `epoch`."""
        method, smoothing = cfg.method, cfg.train.label_smoothing
        begins = max(method.start_epoch, cfg.train.epochs * (1.0 - method.late_share))
        on_turn = step % method.interval == 0
        rho = method.rho(epoch)
        if method.name == "sgd" or rho == 0.0 or epoch < begins or not (on_turn or method.name == "looksam"):
            return Rule(label_smoothing=smoothing)
        if method.name != "esam":
            descent = method.name if method.name in ("gsam", "looksam") else "kept"
            return Rule(
                name=method.name,
                rho=rho,
                radius=rho,
                adaptive_eta=method.eta if method.name == "asam" else None,
                descent=descent,
                alpha=method.alpha,
                reuses=method.name == "looksam" and not on_turn,
                label_smoothing=smoothing,
            )
        beta = 1.0 if method.swp == "norm" else method.beta(epoch)
        return Rule(
            name="esam",
            rho=rho,
            beta=beta,
            gamma=method.gamma(epoch),
            radius=radius(rho, beta, method.swp_scale),
            swp=method.swp,
            score=method.score,
            scope=method.scope,
            transport=method.transport,
            num_quantiles=method.num_quantiles,
            capacity_factor=method.capacity_factor,
            descent=method.descent,
            label_smoothing=smoothing,
        )
