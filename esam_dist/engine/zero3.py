"""DeepSpeed's ZeRO stage 3: no rank holds the weights whole, so all ranks share one perturbation, along the averaged
gradient. That is another m of m-sharpness than everywhere else here: the global batch instead of the rank's.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from esam_dist.engine.deepspeed import DeepSpeedEngine
from esam_dist.engine.state import on_host
from esam_dist.step.examples import Tree
from esam_dist.step.vector import Vector


class Zero3Engine(DeepSpeedEngine):
    """See `step.Engine`. A gradient is this rank's shards of the averaged one; so is what the weights move along."""

    calls_together = True

    def outputs(self, inputs: Tree) -> Any:
        """See `Engine`: with DeepSpeed's hooks, for `gradient` averages."""
        return self(inputs)

    def gradient(self, loss: Tensor, params: list[nn.Parameter], *, fill: bool = False) -> Vector:  # noqa: ARG002
        """See `Engine`: over all `params`, averaged over ranks."""
        self.backward(loss)
        zero = self._ds.optimizer
        taken = {
            param: grad
            for i, group in enumerate(zero.fp16_groups)
            for param, grad in zip(group, zero.averaged_gradients[i], strict=True)
        }
        scale = 1.0 if self._loss_scale is None else self._loss_scale.value
        # Copies: DeepSpeed writes the next gradient to the same memory.
        shards = [taken[param].view_as(param.ds_tensor).clone().div_(scale) for param in params]  # type: ignore[attr-defined]
        # From here on the next backward starts from nothing.
        zero.zero_grad()
        zero.averaged_gradients = {}
        return Vector(params, shards, self._ranks.sum_)

    def average(self, gradient: Vector) -> None:
        """See `Engine`: it is averaged already."""
        scale = 1.0 if self._loss_scale is None else self._loss_scale.value
        shards = dict(zip(gradient.params, gradient.tensors, strict=True))
        zero = self._ds.optimizer
        zero.averaged_gradients = {
            i: [shards[param].flatten() * scale for param in group] for i, group in enumerate(zero.fp16_groups)
        }

    def weights(self, params: list[nn.Parameter]) -> list[Tensor]:
        """See `Engine`: this rank's shards."""
        return [param.ds_tensor.detach() for param in params]  # type: ignore[attr-defined]

    def state_dict(self, *, keep: bool = True) -> dict[str, Any]:
        """See `Engine`."""
        optimizer, model = self._optimizer_state(keep=keep), self._whole_model(keep=keep)
        return {"model": model, "optimizer": optimizer} | self._scaler_state() if keep else {}

    def _whole_model(self, *, keep: bool) -> dict[str, Tensor]:
        """All that the bare model's `state_dict` holds: frozen weights too, and tied ones under each of their names."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        named = dict(self.module.named_parameters(remove_duplicate=False))
        whole: dict[Tensor, Tensor] = {}
        taken: set[Tensor] = set()
        for param in self.module.parameters():
            with nullcontext() if param.requires_grad else GatheredParameters([param]):
                value = safe_get_full_fp32_param(param) if param.requires_grad else param.detach()
                if keep:
                    whole[param] = on_host(value)
        if not keep:
            return {}
        model: dict[str, Tensor] = {}
        for name, value in self.module.state_dict().items():
            if name not in named:
                model[name] = on_host(value)
            else:
                param = named[name]
                model[name] = whole[param].clone() if param in taken else whole[param]
                taken.add(param)
        return model

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Engine`."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        for name, buffer in self.module.named_buffers():
            # One that is not persistent is in no state.
            if name in state["model"]:
                buffer.copy_(state["model"][name])
        for name, param in self.module.named_parameters():
            param.ds_tensor.detach().copy_(self._own_shard(param, state["model"][name]))  # type: ignore[attr-defined]
        for name, param in self._trainable():
            weights = self._own_shard(param, state["model"][name])
            safe_set_local_fp32_param(param, weights)
            for key, value in state["optimizer"][name].items():
                if key != "step":
                    safe_set_local_optimizer_state(param, self._own_shard(param, value), key)
        self._set_update_count(state["optimizer"])
        self._load_scaler(state)

    def _own_shard(self, param: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's slice of a whole tensor, padded as ZeRO pads it."""
        size = param.ds_tensor.numel()  # type: ignore[attr-defined]
        flat = F.pad(value.flatten(), (0, size * self._ranks.world_size - value.numel()))
        return flat.narrow(0, size * self._ranks.rank, size).to(self._ranks.device)

    def _flat_shards(self) -> list[Tensor]:
        return list(self._ds.optimizer.fp32_partitioned_groups_flat)

    def _link_shards(self) -> None:
        """Stage 3 looks states up where they are needed."""
