"""What every method is: a section of the configuration that can be called with a step."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

from pydantic import Field, ValidationError, model_serializer, model_validator
from torch import nn

from esam_dist import wording
from esam_dist.errors import UserError
from esam_dist.schedule import Schedule
from esam_dist.section import Count, Faults, Radius, Section, UpToOne
from esam_dist.step import Moment, Step


class Setup(NamedTuple):
    """What else is configured that a method has to go together with."""

    batch_size: int
    """Per rank and micro-batch."""
    accumulate: int
    """Micro-batches per update."""
    momentum: float
    """The optimizer's."""


class Method(Section):
    """`method(step)` gives the engine the gradient of one update, by the verbs of `Step`."""

    name: str

    def __init__(self, **keys: Any) -> None:
        """Raises UserError for the first key or value that is refused."""
        try:
            super().__init__(**keys)
        except ValidationError as error:
            raise UserError(_first_fault(type(self), error)) from None

    # Pydantic reads a configuration without calling it: those errors have words of their own, with the file's name.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def __call__(self, step: Step) -> None:
        """A step of the base optimizer alone, which is also what every method does out of its phase."""
        step.descend()

    def is_sharp(self, moment: Moment) -> bool:  # noqa: ARG002
        """Whether the update at `moment` is a sharpness-aware one."""
        return False

    def values(self, moment: Moment) -> dict[str, float]:  # noqa: ARG002
        """What the schedules say at `moment`, by key: `rho`, `beta`, `gamma` where the method has them."""
        return {}

    def needs(self) -> set[str]:
        """What it needs that not every engine can do: names in `methods.needs`."""
        return set()

    def faults(self, setup: Setup) -> Faults:  # noqa: ARG002
        """Combinations of keys that make no sense; always in the same order, whatever the values are."""
        return []

    def prepare(self, module: nn.Module) -> None:
        """Called before the first pass. Raises UserError for a network that the method cannot train."""

    def num_groups(self, batch_size: int) -> int:  # noqa: ARG002
        """Into how many parts a batch is divided, each with a perturbation of its own."""
        return 1

    @property
    def stops_early(self) -> bool:
        """Whether a backward pass ends at a cut, so that the network is to be compiled by blocks."""
        return False


class Phase(Section):
    """The part of the training in which a method is sharpness-aware, in shares of the whole."""

    from_: Annotated[UpToOne, Field(alias="from")] = 0.0
    to: UpToOne = 1.0

    def plain(self) -> dict[str, float]:
        """The form that a config file holds."""
        return {"from": self.from_, "to": self.to}

    @model_serializer
    def _serialized(self) -> dict[str, float]:
        return self.plain()

    @model_validator(mode="after")
    def _in_order(self) -> Phase:
        if not self.from_ < self.to:
            raise ValueError(f"from = {self.from_:g} is not before to = {self.to:g}; give shares with from < to")
        return self


class Sharp(Method):
    """Keys that all sharpness-aware methods share."""

    rho: Radius = Schedule.constant(0.05)
    """Radius of the perturbation (L2 norm). A number, `[[epoch, value], ...]`, or `{from, to, epochs}`; so also `beta`
    and `gamma`."""
    phase: Phase = Phase()
    """`{from, to}`: shares of the training between which updates are sharpness-aware; before and after they are plain.
    `{from: 0.4, to: 1}` is late SAM."""
    interval: Count = 1
    """Every k-th update is sharpness-aware, the others plain."""
    group_size: Annotated[int, Field(ge=0)] = 0
    """m of m-sharpness: samples that share a perturbation, and a selection; 0: the rank's batch."""

    def is_sharp(self, moment: Moment) -> bool:
        """Within the phase, in every `interval`-th update, and where the radius is not 0."""
        behind = moment.share >= self.phase.to and self.phase.to < 1.0
        in_phase = self.phase.from_ <= moment.share and not behind
        return in_phase and moment.update % self.interval == 0 and self.rho(moment.epoch) > 0.0

    def values(self, moment: Moment) -> dict[str, float]:
        """See `Method`."""
        return {"rho": self.rho(moment.epoch)}

    def num_groups(self, batch_size: int) -> int:
        """See `Method`."""
        return batch_size // self.group_size if self.group_size else 1

    def needs(self) -> set[str]:
        """See `Method`."""
        return {"groups"} if self.group_size else set()

    def faults(self, setup: Setup) -> Faults:
        """See `Method`."""
        batch = setup.batch_size
        return [
            (
                self.group_size > 0 and batch % self.group_size != 0,
                f"method.group_size = {self.group_size} does not divide data.batch_size = {batch}",
            )
        ]


def _first_fault(kind: type[Method], error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    key = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return f"methods.{kind.__name__} has no key {key!r}; it has {', '.join(kind.model_fields)}"
    message = wording.refused(fault, wording.field_at(kind, fault["loc"]))
    return f"methods.{kind.__name__}: {key} = {fault['input']!r:.80} is refused: {message}"


class Remembering(Sharp):
    """A method that keeps a vector, and moves it once per update by one gradient of the rank's batch."""

    def needs(self) -> set[str]:
        """See `Method`."""
        return super().needs() | {"memory"}

    def faults(self, setup: Setup) -> Faults:
        """See `Method`."""
        return [
            *super().faults(setup),
            (
                setup.accumulate > 1 or self.group_size > 0,
                f"method.name = {self.name} remembers one vector per update: it needs train.accumulate = 1 and "
                "method.group_size = 0",
            ),
        ]
