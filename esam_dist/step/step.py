"""One micro-batch in the hands of a method: the verbs in which the files of `methods` are written.

Shapes: B samples per rank, D samples that this rank keeps for the descent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from esam_dist.clock import PhaseClock
from esam_dist.randomness import Randomness
from esam_dist.ranks import Ranks
from esam_dist.schedule import Schedule
from esam_dist.step import perturbation, swp
from esam_dist.step.batchnorm import frozen_batchnorm
from esam_dist.step.choice import Choice, Sds, Selection, keep_all
from esam_dist.step.engine import Engine, inject
from esam_dist.step.examples import Examples, Tree
from esam_dist.step.perturbation import Perturbation
from esam_dist.step.score import Head
from esam_dist.step.state import MethodState
from esam_dist.step.stats import Moment, StepStats
from esam_dist.step.vector import Vector


@dataclass
class Step:
    """The parts that a step works with, and what it has found out so far."""

    engine: Engine
    ranks: Ranks
    examples: Examples
    moment: Moment
    generator: torch.Generator
    """For the draws that are ours; torch's own generators are seeded for the step too."""
    state: MethodState
    clock: PhaseClock
    autocast: torch.dtype | None = None
    """Type of autocast around forward passes and losses; None: what the caller has set."""

    _first_pass: Randomness | None = field(default=None, init=False)
    """The random state at the first pass, from which dropout drew; None before it."""
    _loss_B: Tensor | None = field(default=None, init=False)
    """At the unperturbed weights."""
    _loss: Tensor | None = field(default=None, init=False)
    _descended: Tensor | None = field(default=None, init=False)
    """Mean loss of the latest pass for the update."""
    _rise: Tensor | None = field(default=None, init=False)
    _finite: Tensor | None = field(default=None, init=False)
    _kept: Selection | None = field(default=None, init=False)
    _choice: Choice | None = field(default=None, init=False)
    _is_perturbed: bool = field(default=False, init=False)
    _at_end: list[Callable[[], None]] = field(default_factory=list, init=False)

    def value(self, schedule: Schedule) -> float:
        """A schedule's value in this step."""
        return schedule(self.moment.epoch)

    def draw(self, mode: swp.Mode = "tensor", beta: float = 1.0) -> swp.Draw:
        """SWP: the weights that this step perturbs."""
        return swp.draw(self.engine.module, mode, beta, self.generator)

    def choice(self, sds: Sds) -> Choice:
        """SDS: begin to choose the samples of the descent, as soon as their scores are known; `descend` ends it."""
        self._choice = choice = Choice(sds, len(self.examples), self.ranks)
        if choice.keeps_all:
            return choice
        if sds.score == "random":
            random_B = torch.rand(len(self.examples), generator=self.generator)
            choice.begin(_to_device(random_B, self.examples.device))
        elif sds.score == "head":
            choice.head = Head(self.engine.module)
        return choice

    def gradient(
        self, over: swp.Draw | Vector | None = None, *, of: Tensor | None = None, fill: bool = False
    ) -> Vector:
        """This rank's own gradient of the mean loss, where the weights now are: no traffic, no hooks, no `.grad`.

        `over`: the weights of a draw, or those of a vector; None: all. `of`: positions of some of the samples. `fill`:
        zeros for weights that have no part in the loss, which are else left out.
        """
        loss_B = self._pass(of)
        params = self.draw().params if over is None else over.params
        found = self.engine.gradient(loss_B.mean(), params, fill=fill or isinstance(over, Vector))
        return swp.compensated(found, over, self.generator) if isinstance(over, swp.Draw) else found

    def look(self) -> None:
        """A forward pass at w, if the scores need one and no gradient has been taken there."""
        choice = self._choice
        # A second pass would draw another dropout, and the rise of a loss would be the difference of two draws.
        if choice is None or choice.keeps_all or choice.is_begun or self._loss_B is not None:
            return
        with torch.set_grad_enabled(choice.head is not None):
            self._pass(None)

    def momentum(self, over: swp.Draw | None = None) -> Vector:
        """The optimizer's momentum of the drawn weights, which points downhill; zeros before the first update."""
        params = (over or self.draw()).params
        return Vector(params, self.engine.momentum(params))

    def along(self, direction: Vector, radius: float | Schedule, norm: Tensor | None = None) -> Perturbation:
        """`radius * d / ||d||` (or `/ norm`), nothing where that is not finite; `direction` is taken over."""
        value = self.value(radius) if isinstance(radius, Schedule) else radius
        if not direction.params:
            device = self.examples.device
            norm = torch.zeros((), device=device)
        found = perturbation.along(direction, value, norm)
        self.clock.end("ascent")
        return found

    @contextmanager
    def at(self, eps: Perturbation, *, keep: bool = False) -> Iterator[None]:
        """Inside the block the weights are `w + eps`; afterwards they are `w` again, to the bit.

        The direction's memory is used up. With `keep` it is not, and a direction that was not finite becomes all zeros.
        """
        self._finite = eps.finite
        if keep and eps.direction.tensors:
            torch._foreach_mul_(eps.direction.tensors, eps.finite.float())
        # BatchNorm's statistics move once, at w; where nothing has been computed there, with the first pass.
        frozen = nullcontext() if self._first_pass is None else frozen_batchnorm(self.engine.module)
        with frozen, self.engine.at(eps, keep=keep):
            self._is_perturbed = True
            try:
                yield
            finally:
                self._is_perturbed = False

    def descend(self, choice: Choice | None = None, *, mixed: Vector | None = None, share: float = 0.0) -> None:
        """The update's gradient: that of the mean loss of the chosen samples over all ranks, where the weights are.

        With `mixed`, a gradient of this rank's own, that one makes up the `share` of the whole.
        """
        kept = self._select(choice)
        examples = self.examples if kept is None else self.examples[kept.index_D]
        # The outputs are not held: backward may need their memory.
        loss_D = self._forward(self.engine, examples)[1]
        kept = kept or keep_all(loss_D.detach())
        loss = kept.mean_over_ranks(loss_D)
        if mixed is not None and mixed.params and self._finite is not None:
            # Where the ascent gradient was not finite there is nothing to recycle.
            part = self._finite.to(loss.dtype) * share
            loss = (1.0 - part) * loss + part * inject(mixed)
        self.engine.backward(loss)
        self._note(loss_D.detach(), kept.index_D)
        self._kept = kept

    def average(self, gradient: Vector) -> None:
        """The update's gradient: the mean over ranks of the one that each has computed."""
        self.engine.average(gradient)

    def mean_over_ranks(self, vector: Vector) -> Vector:
        """The mean over ranks, alike on all of them."""
        return Vector(vector.params, self.ranks.average(vector.tensors), vector.over_shards)

    def averaged_later(self, vector: Vector, then: Callable[[Vector], None]) -> None:
        """Begin to average `vector` over ranks; `then` is called with the mean, a copy, when the step ends."""
        pending = self.ranks.average_later(vector.tensors)
        # Not the vector itself: its memory is the perturbation's.
        params, over_shards = vector.params, vector.over_shards
        self._at_end.append(lambda: then(Vector(params, pending.wait(), over_shards)))

    def averaged(self) -> Vector | None:
        """The averaged gradient of the update, whole, where this micro-batch is its last; else None."""
        params = self.draw().params
        return Vector(params, self.engine.averaged(params)) if self.engine.ends_update else None

    def finish(self, lr: float | None) -> StepStats:
        """End the micro-batch: the engine updates the weights when it was the last one of its update."""
        self.clock.end("descent")
        for action in self._at_end:
            action()
        self._at_end.clear()
        self._choice = None
        ends_update = self.engine.ends_update
        grad_norm = self.engine.step(lr)
        self.clock.end("update")
        loss = self._loss if self._loss_B is None else self._loss_B.mean()
        assert loss is not None, "the method made no pass"
        nan = torch.full_like(loss, torch.nan)
        return StepStats(
            loss=loss,
            sharpness=nan if self._rise is None else self._rise,
            num_kept=torch.full_like(loss, len(self.examples)) if self._kept is None else self._kept.num_kept,
            threshold=nan if self._kept is None else self._kept.threshold,
            skipped=torch.zeros_like(loss) if self._finite is None else (~self._finite).float(),
            grad_norm=grad_norm,
            skipped_update=(~torch.isfinite(grad_norm)).float() if ends_update else torch.zeros_like(loss),
            not_finite=(~torch.isfinite(loss if self._descended is None else loss + self._descended)).float(),
        )

    def _pass(self, of: Tensor | None) -> Tensor:
        """Losses for `gradient`; notes what scores and statistics need of the outputs."""
        examples = self.examples if of is None else self.examples[of]
        choice = None if self._is_perturbed or self._choice is None or self._choice.is_begun else self._choice
        if choice is not None and choice.head is not None:
            choice.head.watch()
        outputs, loss_B = self._forward(self.engine.outputs, examples)
        if self._is_perturbed:
            self._note(loss_B.detach(), slice(None))
        else:
            self._remember_losses(loss_B.detach(), of)
            if choice is not None and not choice.keeps_all:
                choice.see(outputs, loss_B)
        return loss_B

    def _forward(self, forward: Callable[[Tree], Any], examples: Examples) -> tuple[Any, Tensor]:
        """Outputs and losses of one pass; only the first pass of a step moves BatchNorm's statistics."""
        is_first, device = self._first_pass is None, examples.device
        if is_first:
            self._first_pass = Randomness.now(device)
        with ExitStack() as contexts:
            # Inside `at` they are frozen already.
            if not (is_first or self._is_perturbed):
                contexts.enter_context(frozen_batchnorm(self.engine.module))
            # An autocast of the caller's spans all passes, and would go on with copies of weights that have moved.
            torch.clear_autocast_cache()
            if self.autocast is not None:
                contexts.enter_context(torch.autocast(device.type, self.autocast))
            outputs = forward(examples.inputs)
            return outputs, examples.losses(outputs)

    def _select(self, choice: Choice | None) -> Selection | None:
        if choice is None or choice.keeps_all:
            return None
        if not choice.is_begun:
            assert self._first_pass is not None
            assert self._loss_B is not None
            # Dropout draws again what it drew in the first pass: else selection would rank noise.
            with torch.no_grad(), self._first_pass.replayed():
                rise_B = self._forward(self.engine.look, self.examples)[1] - self._loss_B
            self._rise = rise_B.mean()
            self.clock.end("score")
            choice.begin(rise_B)
        selection = choice.end()
        self.clock.end("select")
        return selection

    def _remember_losses(self, loss_D: Tensor, of: Tensor | None) -> None:
        if of is None:
            self._loss_B = loss_D
            return
        if self._loss_B is None:
            self._loss_B = loss_D.new_empty(len(self.examples))
        self._loss_B[of] = loss_D

    def _note(self, loss_D: Tensor, index_D: Tensor | slice) -> None:
        """What the losses of a pass for the update say."""
        self._descended = loss_D.mean()
        if self._loss_B is None:
            self._loss = loss_D.mean()
        elif self._rise is None and self._is_perturbed:
            self._rise = (loss_D - self._loss_B[index_D]).mean()


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Without waiting: from pageable memory, the host would stand until the device has done all earlier work."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
