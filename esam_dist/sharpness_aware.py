"""Sharpness-aware training in anyone's loop; our own loop uses it too.

trainer = SharpnessAware(model, optimizer, methods.ESAM(rho=0.05))
stats = trainer.step(inputs, targets, loss_fn)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from typing_extensions import TypedDict, Unpack

from esam_dist.clock import PhaseClock
from esam_dist.engine.adopt import adopt, refuse_layers
from esam_dist.engine.fit import Batches, refuse_network, refuse_options, refuse_unknown_time
from esam_dist.engine.native import UpdateOptions
from esam_dist.errors import UserError
from esam_dist.methods import SGD, Method
from esam_dist.methods.needs import zero3_refusal
from esam_dist.randomness import seeded
from esam_dist.ranks import Ranks
from esam_dist.step import Engine, Examples, MethodState, Moment, Step, StepStats
from esam_dist.step.batchnorm import GroupStatistics, SoundBuffers
from esam_dist.step.examples import Loss, Tree

PLAIN = SGD()


class Options(TypedDict, total=False):
    """What `SharpnessAware` may be told."""

    accumulate: int
    """Micro-batches (calls of `step`) per update. 1."""
    clip_grad_norm: float
    """Largest global norm of an update's gradient; 0, the default: no clipping."""
    scaler: torch.amp.GradScaler
    """For float16: scales, unscales, and is updated here. None."""
    autocast: torch.dtype
    """The type of autocast around forward passes and losses. None."""
    seed: int
    """Of every random draw: perturbed weights, random scores, dropout. 0."""
    total_updates: int
    """Of the whole training, of which a method's `phase` is a share. 0: unknown."""
    updates_per_epoch: int
    """Needed for schedules of `rho`, `beta` and `gamma`. 0: unknown."""


class SharpnessAware:
    """A model, its optimizer, and the method that trains it, one micro-batch a call of `step`.

    `model` is bare, or in DDP, or a DeepSpeed engine; the ranks are those of the process group. The optimizer's own
    learning rate is used: schedulers go on as ever. Every rank must call `step` equally often, with equally many
    samples. Raises UserError (one line) for what does not go together, at the latest in the first step.
    """

    _batches: Batches | None

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        method: Method,
        **options: Unpack[Options],
    ) -> None:
        refuse_options(options, Options.__annotations__)
        if not isinstance(method, Method):
            raise UserError(
                f"method = {method!r}: give an instance of esam_dist.methods, such as methods.SAM(rho=0.05)"
            )
        refuse_unknown_time(method, options)
        update = UpdateOptions(options.get("accumulate", 1), options.get("clip_grad_norm", 0.0), options.get("scaler"))
        refuse_layers(model)
        ranks = Ranks.of_process_group(next(model.parameters()).device)
        refuse_network(method, model, ranks)
        adopted = adopt(model, optimizer, ranks, update)
        engine = adopted.engine
        if engine.calls_together and (reason := zero3_refusal(method.name, method.needs())):
            raise UserError(reason)
        method.prepare(engine.module)
        self._start(engine, method, ranks, options)
        self._batches = Batches(method, adopted, ranks)

    @classmethod
    def over(cls, engine: Engine, method: Method, ranks: Ranks, **options: Unpack[Options]) -> SharpnessAware:
        """The same over an engine of ours, whose caller says for every step where in the training it lies."""
        trainer = cls.__new__(cls)
        trainer._start(engine, method, ranks, options)
        return trainer

    def _start(self, engine: Engine, method: Method, ranks: Ranks, options: Options) -> None:
        self.engine, self.method, self.ranks = engine, method, ranks
        self.clock = PhaseClock(ranks.device)
        self.state = MethodState(engine.module)
        self.updates = 0
        """Made so far."""
        self._seed, self._autocast = options.get("seed", 0), options.get("autocast")
        self._total_updates, self._updates_per_epoch = (
            options.get("total_updates", 0),
            options.get("updates_per_epoch", 0),
        )
        self._micro = 0
        self._batches = None
        self._buffers: SoundBuffers | None = None

    def step(
        self, inputs: Tree, targets: Tree, loss_fn: Loss, *, moment: Moment | None = None, lr: float | None = None
    ) -> StepStats:
        """Train on one micro-batch; the weights move with the last one of an update.

        `inputs` and `targets`: tensors, or nested tuples, lists and dicts of them, with the samples in dimension 0; a
        tuple is the model's arguments, a dict its keyword arguments. `loss_fn(outputs, targets)` returns one loss per
        sample, [B]. `moment` and `lr` override where in the training this is, and the optimizer's rate.

        An update whose averaged gradient is not finite is skipped on all ranks, and said so by `skipped_update`. The
        host need not wait for that with an optimizer of torch's that is made with `fused=True`.
        """
        moment = moment or self._moment()
        examples = Examples(inputs, targets, loss_fn)
        if self._batches is not None:
            self._batches.check(len(examples))
        num_groups = self.method.num_groups(len(examples))
        size = len(examples) // num_groups
        # As if each group had a rank of its own.
        statistics = GroupStatistics(self.engine.module) if num_groups > 1 else None
        # Not sooner: what the caller loads comes after this trainer is made.
        self._buffers = self._buffers or SoundBuffers(self.engine.module)
        groups = []
        for group in range(num_groups):
            part = examples[slice(group * size, (group + 1) * size)] if num_groups > 1 else examples
            names = (self._seed, moment.update, self._micro // num_groups, self.ranks.rank * num_groups + group)
            groups.append(self._group(part, moment, lr, names))
            if statistics:
                statistics.end_group()
        if statistics:
            statistics.finish()
        if self._micro == 0:
            # Each rank's BatchNorm statistics come from its own batches.
            self.ranks.average_buffers(self.engine.module)
            self._buffers.restore()
            self.updates += 1
        return StepStats.merged(groups)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold besides model and optimizer, for the training to go on as it would have.

        Taken between two updates: raises UserError where some of an update's micro-batches are still to come.
        """
        if self._micro:
            raise UserError(
                f"state_dict after {self._micro} micro-batches of an update, whose gradient no checkpoint holds: save "
                "when `updates` has gone up"
            )
        return {"updates": self.updates, "method": self.state.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse, before the first step."""
        self.updates, self._micro = state["updates"], 0
        self.state.load_state_dict(state["method"])

    def _group(self, examples: Examples, moment: Moment, lr: float | None, names: tuple[int, ...]) -> StepStats:
        """One step of the method; everything random in it is a function of `names`, so no random state is carried."""
        with seeded(names, examples.device) as generator:
            step = Step(self.engine, self.ranks, examples, moment, generator, self.state, self.clock, self._autocast)
            (self.method if self.method.is_sharp(moment) else PLAIN)(step)
            self._micro = 0 if self.engine.ends_update else self._micro + 1
            return step.finish(lr)

    def _moment(self) -> Moment:
        total, in_epoch = self._total_updates, self._updates_per_epoch
        return Moment(
            self.updates, self.updates / in_epoch if in_epoch else 0.0, self.updates / total if total else 0.0
        )
