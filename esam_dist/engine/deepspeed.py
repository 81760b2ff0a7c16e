"""The engine of DeepSpeed: ZeRO stages 0, 1 and 2. Its JSON is built here, from our configuration."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from esam_dist.engine.guard import not_finite, skipping
from esam_dist.engine.state import (
    initial_state,
    load_by_name,
    model_state,
    momentum_key,
    momentum_of,
    on_host,
    state_by_name,
)
from esam_dist.ranks import Ranks, limit_group
from esam_dist.step.engine import Engine, inject
from esam_dist.step.examples import Tree, call
from esam_dist.step.vector import Vector


def deepspeed_config(
    *, batch_size: int, accumulate: int, zero_stage: int, clip_grad_norm: float, offload: bool = False
) -> dict[str, Any]:
    """What `deepspeed.initialize` is given. `batch_size` is per rank and micro-batch."""
    zero: dict[str, Any] = {"stage": zero_stage}
    if zero_stage == 3:
        # All parameters are sharded, so that all can be perturbed in the same way.
        zero["stage3_param_persistence_threshold"] = 0
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Progress is ours to report.
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def initialize(
    module: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, ds_config: dict[str, Any], timeout_seconds: float
) -> Any:
    """`deepspeed.initialize`, quietly, and with `timeout_seconds` for every collective."""
    # Set beforehand: DeepSpeed would guess it, with a warning.
    os.environ.setdefault("DS_ACCELERATOR", ranks.device.type)
    import deepspeed

    if ranks.device.type == "cpu":
        # A C++ extension for all-reduce on one host's CPUs: a minute of compiling, by all ranks at once, for a
        # path that only tests and trials take.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(seconds=timeout_seconds)
    backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        # A process alone: without a group, and without what a launcher sets, DeepSpeed does not work.
        store = dist.HashStore()  # type: ignore[attr-defined]  # torch exports it only where it is distributed
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK=str(ranks.local_rank))
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False, auto_mpi_discovery=False)
    # ZeRO calls every optimizer but its own untested; our tests are what tests SGD and AdamW under it.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    ds, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds_config)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed averages over a copy of the process group, to which it gives torch's default timeout.
    limit_group(ds.seq_data_parallel_group, timeout_seconds)
    return ds


class DeepSpeedEngine(Engine):
    """See `step.Engine`. With `fp16`, DeepSpeed unscales, checks and skips by the loss scale that we set."""

    def __init__(self, ds: Any, optimizer: torch.optim.Optimizer, ranks: Ranks, *, fp16: bool = False) -> None:
        self.module = ds.module
        self._ds = ds
        self._stage = int(ds.zero_optimization_stage())
        self._optimizer, self._ranks = optimizer, ranks
        self._loss_scale = LossScale() if fp16 else None
        self._is_linked = False

    @property
    def ends_update(self) -> bool:
        """See `Engine`."""
        return bool(self._ds.is_gradient_accumulation_boundary())

    def __call__(self, inputs: Tree) -> Any:
        """See `Engine`."""
        return call(self._ds, inputs)

    def scale(self, loss: Tensor) -> Tensor:
        """See `Engine`."""
        if self._loss_scale is None:
            return loss
        accumulate: int = self._ds.gradient_accumulation_steps()
        return loss * (self._loss_scale.value / accumulate)

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        if self._loss_scale is not None:
            self._ds.optimizer.override_loss_scale(self._loss_scale.value)
        self._ds.backward(loss)

    def average(self, gradient: Vector) -> None:
        """See `Engine`."""
        self.backward(inject(gradient))

    def step(self, lr: float | None) -> Tensor:
        """See `Engine`."""
        if lr is not None:
            for group in self._ds.optimizer.param_groups:
                group["lr"] = lr
        if not self.ends_update:
            self._ds.step()
            return torch.full((), torch.nan, device=self._ranks.device)
        if self._stage == 0:
            # Without ZeRO, DeepSpeed tells no norm; the averaged gradients are whole here until the step.
            grads = [param.grad for param in self.module.parameters() if param.grad is not None]
            grad_norm = torch.nn.utils.get_total_norm(grads)
            with skipping(self._optimizer, not_finite(grad_norm)):
                self._ds.step()
            return grad_norm.float()
        self._ds.step()
        overflow = self._ds.optimizer.overflow
        if self._loss_scale is not None:
            self._loss_scale.update(overflow=overflow)
        # ZeRO has left all as it was; of stage 3 the norm is then still that of the update before.
        norm = torch.inf if overflow else self._ds.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self._ranks.device)

    def momentum(self, params: list[nn.Parameter]) -> list[Tensor]:
        """See `Engine`."""
        if self._stage == 0:
            return momentum_of(self._optimizer, params)
        from deepspeed.utils import safe_get_full_optimizer_state

        key = momentum_key(self._optimizer)
        if not all(key in self._shards()[shard] for shard in self._flat_shards()):
            return [torch.zeros_like(param) for param in params]
        if not self._is_linked:
            # Of what `deepspeed.initialize` has made for somebody else, only the first group's state is linked.
            self._ds.optimizer._hp_optimizer_states_linked = False
            self._link_shards()
            self._is_linked = True
        return self._whole(params, lambda param: safe_get_full_optimizer_state(param, key))

    def averaged(self, params: list[nn.Parameter]) -> list[Tensor]:
        """See `Engine`."""
        from deepspeed.utils import safe_get_full_grad

        scale = 1.0 if self._loss_scale is None else self._loss_scale.value
        grads = self._whole(params, safe_get_full_grad)
        return [
            torch.zeros_like(param) if grad is None else grad.clone().div_(scale)
            for param, grad in zip(params, grads, strict=True)
        ]

    def _whole(self, params: list[nn.Parameter], read: Callable[[nn.Parameter], Any]) -> list[Any]:
        """What `read`, a collective, returns for each of `params`. It is called for the others too: each rank may have
        drawn weights of its own, but all must take part in the same calls.
        """
        wanted, found = set(params), {}
        for _, param in self._trainable():
            value = read(param)
            if param in wanted:
                found[param] = value
        return [found[param] for param in params]

    def state_dict(self, *, keep: bool = True) -> dict[str, Any]:
        """See `Engine`. The shards of ZeRO are joined parameter by parameter."""
        if self._stage == 0:
            return state_by_name(self.module, self._optimizer) if keep else {}
        optimizer = self._optimizer_state(keep=keep)
        return {"model": model_state(self.module), "optimizer": optimizer} | self._scaler_state() if keep else {}

    def _optimizer_state(self, *, keep: bool) -> dict[str, dict[str, Tensor]]:
        """Whole, by parameter; all ranks join the shards of one tensor after the other, and where `keep` copy them."""
        from deepspeed.utils import safe_get_full_optimizer_state

        shard = next(iter(self._shards().values()), {})
        found: dict[str, dict[str, Tensor]] = {}
        for name, param in self._trainable():
            found[name] = {}
            for key, value in shard.items():
                whole = value if key == "step" else safe_get_full_optimizer_state(param, key)
                if keep:
                    found[name][key] = on_host(whole)
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Engine`."""
        if self._stage == 0:
            load_by_name(self.module, self._optimizer, state)
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self.module.load_state_dict(state["model"])
        for name, param in self._trainable():
            safe_set_full_fp32_param(param, state["model"][name].to(param.device))
            for key, value in state["optimizer"][name].items():
                if key != "step":
                    safe_set_full_optimizer_state(param, value.to(param.device), key)
        self._set_update_count(state["optimizer"])
        self._load_scaler(state)

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, param) for name, param in self.module.named_parameters() if param.requires_grad]

    def _shards(self) -> dict[Tensor, dict[str, Tensor]]:
        """The optimizer's state of each flat shard that this rank owns, by the shard."""
        return self._ds.optimizer.optimizer.state  # type: ignore[no-any-return]

    def _flat_shards(self) -> list[Tensor]:
        return list(self._ds.optimizer.single_partition_of_fp32_groups)

    def make_shards(self) -> None:
        """Give every shard of the optimizer its initial state now, so that it can be saved from the start on.

        DeepSpeed would do it in the first step, but links the state of all parameter groups after the first group's
        update, when the other groups have none yet: their state could not be saved then (seen with 0.19.8).
        """
        for shard in self._flat_shards() if self._stage > 0 else []:
            state = initial_state(self._ds.optimizer.optimizer, shard)
            if state:
                self._shards()[shard] = state
        if self._stage > 0 and self._shards():
            self._link_shards()

    def _link_shards(self) -> None:
        self._ds.optimizer._lazy_init_hp_params_optimizer_state()

    def _set_update_count(self, saved: dict[str, dict[str, Tensor]]) -> None:
        """AdamW counts its updates, once for each shard."""
        count = next(iter(saved.values()), {}).get("step")
        for shard in self._shards().values():
            if count is not None and "step" in shard:
                shard["step"] = count.clone()

    def _scaler_state(self) -> dict[str, Any]:
        return {"scaler": {} if self._loss_scale is None else self._loss_scale.state_dict()}

    def _load_scaler(self, state: dict[str, Any]) -> None:
        if self._loss_scale is not None and state.get("scaler"):
            self._loss_scale.load_state_dict(state["scaler"])


class LossScale:
    """The rule of `torch.amp.GradScaler`, and its form of state, for an engine that checks for overflow itself."""

    GROWTH_FACTOR, BACKOFF_FACTOR, GROWTH_INTERVAL = 2.0, 0.5, 2000

    def __init__(self) -> None:
        self.value = 65536.0
        self._good_steps = 0

    def update(self, *, overflow: bool) -> None:
        """Halve after an overflow; double after 2,000 updates without one."""
        if overflow:
            self.value, self._good_steps = self.value * self.BACKOFF_FACTOR, 0
            return
        self._good_steps += 1
        if self._good_steps == self.GROWTH_INTERVAL:
            self.value, self._good_steps = self.value * self.GROWTH_FACTOR, 0

    def state_dict(self) -> dict[str, Any]:
        """As `torch.amp.GradScaler.state_dict`."""
        return {
            "scale": self.value,
            "growth_factor": self.GROWTH_FACTOR,
            "backoff_factor": self.BACKOFF_FACTOR,
            "growth_interval": self.GROWTH_INTERVAL,
            "_growth_tracker": self._good_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse."""
        self.value, self._good_steps = state["scale"], state["_growth_tracker"]
