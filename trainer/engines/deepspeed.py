"""DeepSpeed's ZeRO: all that talks to the package, but for the checks of its settings.

DeepSpeed is told of one flat world of ranks and of nothing else: given a sequence-parallel size or mesh, it reduces
gradients over a part of the ranks and lets the others diverge. Context parallelism, accumulation and the scale of the
loss are farspan's, as under FSDP2.

Checkpoints are those of every engine, see `state`: they fit any number of ranks, stage and engine, and reading them
runs no code, unlike the pickles that DeepSpeed writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from farspan.parallel.mesh import Mesh, group_along
from farspan.trainer.build import unsharded
from farspan.trainer.config import Config
from farspan.trainer.engines.deepspeed_settings import import_deepspeed, settings_of
from farspan.trainer.model.init import draw
from farspan.trainer.model.transformer import Transformer
from farspan.trainer.optim import add_state, build_adamw

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MOMENTS = "exp_avg", "exp_avg_sq"


def build_deepspeed(config: Config, mesh: Mesh, device: torch.device) -> ZeroEngine:
    """Return the initialized model and its optimizer under ZeRO; raises ConfigError for settings that it refuses."""
    deepspeed, stage, settings = import_deepspeed(), config.deepspeed.zero_stage, settings_of(config, mesh.degrees)
    with torch.device("meta"):
        plain = unsharded(config)
    shapes = {name: parameter.shape for name, parameter in plain.named_parameters()}
    # At stage 3 each module is sharded as soon as it is made.
    shards = deepspeed.zero.Init(config_dict_or_path=settings) if stage == 3 else nullcontext()
    with torch.device(device), shards:
        model = unsharded(config)
    for name, buffer in plain.named_buffers():
        # At stage 3 all tensors are made in the dtype of the computation, which biases of routers do not have.
        module, _, last = name.rpartition(".")
        model.get_submodule(module).register_buffer(last, torch.zeros_like(buffer, device=device))
    # A shard has one dimension, whatever the parameter has.
    dimensions = [(parameter, len(shapes[name])) for name, parameter in model.named_parameters()]
    optimizer = build_adamw(dimensions, config.optimizer)
    wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    engine = ZeroEngine(wrapped, optimizer, mesh, device, stage, config.optimizer.max_gradient_norm)
    # Drawn in float32, also where DeepSpeed had the parameters in bfloat16 only.
    drawn = {name: engine.shard(torch.zeros(shape)) for name, shape in shapes.items()}
    for name, tensor in drawn.items():
        draw(tensor, name, config.model, config.run.seed)
    engine.load_state(drawn)
    return engine


class ZeroEngine:
    """A model under DeepSpeed's ZeRO; masters and moments are in float32, gradients are freed by each step."""

    def __init__(
        self,
        wrapped: DeepSpeedEngine,
        optimizer: torch.optim.AdamW,
        mesh: Mesh,
        device: torch.device,
        stage: int,
        max_gradient_norm: float,
    ) -> None:
        self.wrapped, self.optimizer, self.model = wrapped, optimizer, cast(Transformer, wrapped.module)
        self._mesh, self._device, self._stage = mesh, device, stage
        self._max_gradient_norm = max_gradient_norm
        self._world = dist.get_world_size()
        # Checkpoints are made of CPU memory: on a GPU the shards of full tensors would come on top of DeepSpeed's own.
        group = group_along("checkpoint shards", {"ranks": self._world}, "ranks", backend="gloo")
        self._cpu_mesh = DeviceMesh.from_group(group, "cpu")
        # A ZeRO optimizer, from stage 1 on.
        self._zero: Any = wrapped.optimizer
        self._masters = (
            self._zero.fp32_partitioned_groups_flat
            if stage == 3
            else [parameter for part in optimizer.param_groups for parameter in part["params"]]
        )
        for group, master in enumerate(self._masters):
            # One on NVMe has no elements otherwise, and its moments would have none.
            is_on_nvme = stage == 3 and self._zero._swappable_optimizer_subgroup(group)
            if is_on_nvme:
                self._zero._optimizer_states_and_gradient_swap_in(group)
            add_state(optimizer, [master])
            if is_on_nvme:
                self._zero._optimizer_states_and_gradient_swap_out(group)
        if stage in (1, 2):
            # Otherwise DeepSpeed finds moments only after an update.
            self._zero._lazy_init_hp_params_optimizer_state()
        self._is_update: Callable[[], bool] = lambda: True
        update = optimizer.step

        def step_if_asked() -> None:
            if self._is_update():
                update()

        # DeepSpeed reduces, clips, updates and gathers in one call; whether to update depends on the norm.
        optimizer.step = step_if_asked  # pyright: ignore[reportAttributeAccessIssue]

    def zero_grad(self) -> None:
        """The step before has freed all gradients."""

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed takes the mean over ranks, where the gradient is a sum.
        self.wrapped.backward(loss * self._world, scale_wrt_gas=False)
        if not self.wrapped.is_gradient_accumulation_boundary():
            self.wrapped.step()  # only counts the micro-batch

    def step(self, is_update: Callable[[Tensor], bool]) -> None:
        decided: list[bool] = []

        def decide() -> bool:
            # DeepSpeed calls the optimizer once for each group of parameters.
            if not decided:
                decided.append(is_update(self._gradient_norm()))
            return decided[0]

        self._is_update = decide
        self.wrapped.step()
        if not decided:
            # It leaves out the update of a gradient that is not finite.
            is_update(torch.tensor(math.inf))

    def _gradient_norm(self) -> Tensor:
        """Return the norm before clipping, when the optimizer is called."""
        if self._stage == 0:
            # The same on all ranks, which have all gradients.
            return nn.utils.clip_grad_norm_(self.model.parameters(), self._max_gradient_norm)
        return torch.as_tensor(self._zero._global_grad_norm)

    def state(self) -> dict[str, Any]:
        model: dict[str, Tensor] = {}
        optimizer: dict[str, dict[str, Tensor]] = {}
        step = self.optimizer.state[self._masters[0]]["step"]
        for name, parameter in self.model.named_parameters():
            model[name] = self.shard(self._full(parameter))
            optimizer[name] = {key: self.shard(self._full(parameter, key)) for key in MOMENTS}
            optimizer[name]["step"] = step.detach().cpu().clone()
        return {"model": {**model, **self._aliases(model), **dict(self.model.named_buffers())}, "optimizer": optimizer}

    def _aliases(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of parameters that have a second name."""
        first = {parameter: name for name, parameter in self.model.named_parameters()}
        names = self.model.named_parameters(remove_duplicate=False)
        return {name: tensors[first[parameter]] for name, parameter in names}

    def load_state(self, model: Mapping[str, Any], optimizer: Mapping[str, Any] | None = None) -> None:
        import deepspeed

        for name, parameter in self.model.named_parameters():
            # Does nothing below stage 3. A parameter on NVMe has its shard in memory only while it is gathered.
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                self._fill(parameter, self._gather(model[name]))
                if optimizer is not None:
                    for key in MOMENTS:
                        self._fill(parameter, self._gather(optimizer[name][key]), key)
        if optimizer is not None:
            for master in self._masters:
                self.optimizer.state[master]["step"].copy_(next(iter(optimizer.values()))["step"])
        for name, buffer in self.model.named_buffers():
            if name in model:
                buffer.copy_(model[name])

    def shard(self, full: Tensor) -> DTensor:
        """Return the rows of a full tensor that this rank saves, as a copy in CPU memory; every rank has the others."""
        rows = full.shape[0]
        chunk, rank = -(-rows // self._world), dist.get_rank()
        local = full[min(rank * chunk, rows) : min((rank + 1) * chunk, rows)].detach().to("cpu", copy=True)
        return DTensor.from_local(
            local, self._cpu_mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride()
        )

    def _gather(self, sharded: DTensor) -> Tensor:
        """Return the full tensor of shards as `shard` makes them, on the device of the run."""
        local = sharded.to_local().to(self._device)
        return DTensor.from_local(
            local, self._mesh.fsdp, [Shard(0)], run_check=False, shape=sharded.shape, stride=sharded.stride()
        ).full_tensor()

    def _full(self, parameter: nn.Parameter, moment: str | None = None) -> Any:
        """Return the full master of a parameter, or one of its moments, in float32."""
        if self._stage == 0:
            return parameter if moment is None else self.optimizer.state[parameter][moment]
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if moment is None:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, moment)

    @torch.no_grad()
    def _fill(self, parameter: nn.Parameter, value: Tensor, moment: str | None = None) -> None:
        """Set the master of a gathered parameter and what is computed with, or a moment; value: full, on all ranks."""
        from deepspeed import utils

        if self._stage == 0:
            (parameter if moment is None else self.optimizer.state[parameter][moment]).copy_(value)
        elif self._stage < 3:
            if moment is None:
                parameter.copy_(value)
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, moment)
        else:
            # Shards are of the flat tensor, padded to a multiple of the ranks; DeepSpeed pads only what it gathers.
            size = parameter.ds_tensor.numel()  # pyright: ignore[reportAttributeAccessIssue]
            padded = nn.functional.pad(value.flatten(), (0, size * self._world - value.numel()))
            part = padded[size * dist.get_rank() :][:size]
            if moment is None:
                parameter.copy_(value)
                utils.safe_set_local_fp32_param(parameter, part)
            else:
                utils.safe_set_local_optimizer_state(parameter, part, moment)

    def sharding_bytes(self, mesh: Mesh, dtype: torch.dtype, *, micro_batches: int, passes_ahead: int) -> None:
        """They depend on buckets and prefetching inside DeepSpeed."""
