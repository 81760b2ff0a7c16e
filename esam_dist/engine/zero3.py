"""DeepSpeed's ZeRO stage 3: no rank holds the weights whole, so all ranks share one perturbation, along the averaged
gradient. That is another m of m-sharpness than everywhere else here: the global batch instead of the rank's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esam_dist.engine.deepspeed import DeepSpeedEngine


class Zero3Engine(DeepSpeedEngine):
    """See `engine.base.Engine`; besides, `perturbed_by_average`."""

    @contextmanager
    def perturbed_by_average(self, radius: float) -> Iterator[Tensor]:
        """After `backward`: move each shard of the weights along its shard of the averaged gradient, then forget that.

        The perturbation has norm `radius` over all shards. Yields whether the gradient was finite (scalar bool); where
        it was not, nothing moves. On leaving, the shards are restored to the bit; the `backward` inside the block is
        the one that counts for `step`.
        """
        zero = self._ds.optimizer
        shards = [param.ds_tensor for group in zero.fp16_groups for param in group]
        grads = [grad for i in range(len(zero.fp16_groups)) for grad in zero.averaged_gradients[i]]
        norm = self._ranks.sum_(torch.nn.utils.get_total_norm(grads).square()).sqrt()
        finite = torch.isfinite(norm)
        scale = torch.where(finite & (norm > 0), radius / norm, torch.zeros_like(norm))
        backup = [shard.detach().clone() for shard in shards]
        with torch.no_grad():
            for shard, grad in zip(shards, grads, strict=True):
                shard.add_(grad.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).view_as(shard) * scale)
        # From here on the next backward starts from nothing.
        zero.zero_grad()
        zero.averaged_gradients = {}
        try:
            yield finite
        finally:
            torch._foreach_copy_([shard.detach() for shard in shards], backup)

    def state_dict(self) -> dict[str, Any]:
        """See `Engine`."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        model = {name: buffer.detach().cpu().clone() for name, buffer in self.module.named_buffers()}
        optimizer: dict[str, dict[str, Tensor]] = {}
        shard = next(iter(self._shards().values()), {})
        for name, param in self._trainable():
            model[name] = safe_get_full_fp32_param(param).cpu().clone()
            optimizer[name] = {
                key: value.cpu().clone() if key == "step" else safe_get_full_optimizer_state(param, key).cpu().clone()
                for key, value in shard.items()
            }
        return {"model": model, "optimizer": optimizer} | self._scaler_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Engine`."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        for name, buffer in self.module.named_buffers():
            buffer.copy_(state["model"][name])
        for name, param in self._trainable():
            weights = self._own_shard(param, state["model"][name])
            param.ds_tensor.detach().copy_(weights)  # type: ignore[attr-defined]
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
