"""What a method carries from step to step beyond weights and momentum."""

from __future__ import annotations

from torch import Tensor, nn

from esam_dist.step.vector import Vector


class MethodState:
    """Vectors by name, over all trainable weights and alike on all ranks: LookSAM's flat part, a moving average."""

    def __init__(self, module: nn.Module) -> None:
        self._params = [param for param in module.parameters() if param.requires_grad]
        self._vectors: dict[str, Vector] = {}

    def recall(self, name: str) -> Vector | None:
        """What was remembered as `name`; None before the first time."""
        return self._vectors.get(name)

    def remember(self, name: str, vector: Vector) -> None:
        """Keep `vector`, over all trainable weights, until it is replaced."""
        assert len(vector.params) == len(self._params)
        self._vectors[name] = vector

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Copies on the CPU, for a checkpoint."""
        return {
            name: [tensor.to("cpu", copy=True) for tensor in vector.tensors] for name, vector in self._vectors.items()
        }

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """The reverse."""
        self._vectors = {
            name: Vector(self._params, [t.to(p.device) for p, t in zip(self._params, tensors, strict=True)])
            for name, tensors in state.items()
        }
