"""The one error type for what a user can get wrong.

ValueError
  UserError    one line naming key, value and remedy; the command line prints it and exits with status 2
    LossNotFiniteError           training cannot go on; counted in the run's history
      StateNotFiniteError        the same, seen where a checkpoint would be written
    ReplicasDifferError          a rank holds other weights than the others; training cannot go on
    CheckpointNotWrittenError    the disk refused a checkpoint; training goes on, unless it was the last
"""


def printable(text: str) -> str:
    """`text` as it can be logged: text from outside may hold line breaks, or control codes that a terminal obeys."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class UserError(ValueError):
    """Something the user gave is wrong: the message is one line that names the key, the value and the remedy."""


class LossNotFiniteError(UserError):
    """The training loss became infinite or NaN."""


class StateNotFiniteError(LossNotFiniteError):
    """Weights, buffers or the optimizer's state became infinite or NaN, perhaps before the loss did."""


class ReplicasDifferError(UserError):
    """The weights of a rank are not those of the others."""


class CheckpointNotWrittenError(UserError):
    """The disk refused a checkpoint; those before it are still there."""
