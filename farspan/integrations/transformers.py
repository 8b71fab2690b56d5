"""Attention of farspan in stock models of Hugging Face's transformers, on one device or over the ranks of a group.

    register()
    config.farspan = {"mechanism": "moba", "options": {"block": 512, "top_k": 8}}    # as [attention] of a run
    model = AutoModelForCausalLM.from_config(config, attn_implementation="farspan")
    with context_parallel(model, group, strategy="ring"):
        model(input_ids, labels=labels).loss.backward()

docs/integrations.md has the rest. Legend: B sequences of a batch, S their tokens, T those of a rank.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from farspan.errors import ConfigError
from farspan.integrations.transformers_attention import (
    Documents,
    ShardedBatch,
    attend,
    documents_of,
    padding_mask,
)
from farspan.parallel.context_parallel.api import ContextParallel
from farspan.parallel.context_parallel.eager import eager
from farspan.trainer.hugging_face.architectures import PLUG_IN

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
except ImportError:
    raise ConfigError(
        "farspan.integrations.transformers needs transformers: pip install 'farspan[transformers]'."
    ) from None
if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer

IGNORED = -100
"""Label of a token without a loss."""
UNSHARDED = ("inputs_embeds", "cache", "past_key_values", "logits_to_keep")
"""Inputs that are not sharded; generation passes the last ones."""


def register() -> None:
    """Make `attn_implementation="farspan"` known to transformers; call it before a model is made or loaded.

    A configuration with an entry `farspan` is saved with this implementation, as none is otherwise: transformers would
    load the model with dense attention, and say nothing.
    """
    if PLUG_IN in AttentionInterface():
        return
    AttentionInterface.register(PLUG_IN, attend)
    AttentionMaskInterface.register(PLUG_IN, padding_mask)
    to_dict = PreTrainedConfig.to_dict

    def with_implementation(self: PreTrainedConfig) -> dict[str, Any]:
        fields = to_dict(self)
        return fields | {"attn_implementation": PLUG_IN} if fields.get(PLUG_IN) else fields

    PreTrainedConfig.to_dict = with_implementation


@contextmanager
def context_parallel(
    model: "PreTrainedModel", group: dist.ProcessGroup, strategy: str = "auto", layout: str = "zigzag"
) -> Iterator[ContextParallel]:
    """Shard each sequence that `model` is called with over the ranks of a group, which all call it with the same ones.

    input_ids, labels, position_ids and attention_mask are those of all tokens, `[B, S]`. Logits are those of the rank's
    own tokens. The loss is such that its mean over ranks is right, and with it that of gradients, as DDP and FSDP take
    it: the sum over the rank's own tokens, over the number of labels, times the number of ranks. Without gradients it
    is the mean over the group. Raises ConfigError where ranks have other sequences.
    """
    shared = ContextParallel(group, strategy, layout)
    hooks = [
        model.register_forward_pre_hook(_ShardInputs(shared), with_kwargs=True),
        model.register_forward_hook(_AverageLoss(shared)),
    ]
    try:
        yield shared
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def context_parallel_trainer(
    trainer: "Trainer", group: dist.ProcessGroup, strategy: str = "auto", layout: str = "zigzag"
) -> Iterator[ContextParallel]:
    """`context_parallel` for the model of a Trainer, whose ranks of a group then load the same batches.

    Evaluation computes the loss alone. Raises ConfigError for groups whose ranks are not consecutive, for what needs
    logits of all tokens, and for data that one rank reads for all.
    """
    from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard

    ranks = dist.get_process_group_ranks(group)
    size = len(ranks)
    if ranks != list(range(ranks[0], ranks[0] + size)) or ranks[0] % size:
        raise ConfigError(f"group has ranks {ranks}: use groups of consecutive ranks, such as 0 and 1.")
    if any(x is not None for x in (trainer.compute_metrics, trainer.label_smoother, trainer.compute_loss_func)):
        raise ConfigError(
            "Trainer has compute_metrics, compute_loss_func or label_smoothing_factor, which need logits of all "
            "tokens, but a rank has those of its own: leave them out."
        )

    def shared(get: Callable[..., Any], *, is_evaluation: bool) -> Callable[..., DataLoader[Any]]:
        def of_group(*arguments: Any) -> DataLoader[Any]:
            loader = get(*arguments)
            shard = loader.dataset if isinstance(loader.dataset, IterableDatasetShard) else loader.batch_sampler
            if not isinstance(shard, BatchSamplerShard | IterableDatasetShard):
                raise ConfigError(
                    "one rank reads the batches of all, which context parallelism does not share: set "
                    "accelerator_config={'dispatch_batches': False}."
                )
            # The ranks of a group count as one, which reads its part of the data.
            shard.num_processes, shard.process_index = dist.get_world_size() // size, dist.get_rank() // size
            if is_evaluation and shard is loader.batch_sampler and len(loader.dataset) % loader.total_batch_size:
                raise ConfigError(
                    f"an evaluation of {len(loader.dataset)} sequences is no multiple of {loader.total_batch_size}, "
                    "those of a step, so that Trainer would weigh the last wrongly: leave some out."
                )
            return loader

        return of_group

    def refuse(*arguments: Any) -> DataLoader[Any]:
        raise ConfigError("predict() needs logits of all tokens: call it outside of context_parallel_trainer.")

    replaced = {
        # Labels are counted on all ranks, those of a group once for each of them.
        "get_cp_size": lambda: size,
        "get_train_dataloader": shared(trainer.get_train_dataloader, is_evaluation=False),
        "get_eval_dataloader": shared(trainer.get_eval_dataloader, is_evaluation=True),
        "get_test_dataloader": refuse,
    }
    vars(trainer).update(replaced)
    try:
        with context_parallel(cast("PreTrainedModel", trainer.model), group, strategy, layout) as cp:
            yield cp
    finally:
        for name in replaced:
            delattr(trainer, name)


class _ShardInputs:
    """A hook before a model's forward pass: inputs of all tokens become those of the rank."""

    def __init__(self, cp: ContextParallel) -> None:
        self.cp, self.compared = cp, False

    @eager
    def __call__(
        self, model: "PreTrainedModel", arguments: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        if arguments:
            inputs = {"input_ids": arguments[0], **inputs}
        self._refuse(model, arguments, inputs)
        tokens = inputs["input_ids"]
        self._compare(tokens)
        batch, length = tokens.shape
        position_ids, mask = inputs.get("position_ids"), inputs.get("attention_mask")
        if mask is not None and mask.all():
            mask = None
        documents = documents_of(batch, length, mask, position_ids, inputs.get("cu_seq_lens_q")) or ((length,),) * batch
        if position_ids is None:
            position_ids = torch.arange(length, device=tokens.device)[None]
        local = {
            "input_ids": self._shard(tokens, documents),
            "position_ids": self._shard(position_ids.expand(batch, -1), documents),
        }
        labels = inputs.get("shift_labels")
        if labels is None and inputs.get("labels") is not None:
            # Each token predicts the next one, which another rank may have.
            labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)
        if labels is not None:
            local["labels"] = local["shift_labels"] = self._shard(labels, documents, IGNORED)
            if inputs.get("num_items_in_batch") is None:
                local["num_items_in_batch"] = (labels != IGNORED).sum() / self.cp.channel.size
        dropped = ("attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        kept = {name: value for name, value in inputs.items() if name not in dropped}
        return (), {**kept, **local, "use_cache": False, "sharded_batch": ShardedBatch(self.cp, documents)}

    def _shard(self, x: Tensor, documents: Documents, fill: int = 0) -> Tensor:
        """`[B, S] -> [B, T]`"""
        rows = [self.cp.shard(row, documents=of_row, fill=fill) for row, of_row in zip(x, documents, strict=True)]
        return torch.stack(rows)

    def _refuse(self, model: "PreTrainedModel", arguments: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        given = [name for name in UNSHARDED if inputs.get(name) is not None]
        problem = None
        if model.config._attn_implementation != PLUG_IN:
            problem = (
                f"attn_implementation={model.config._attn_implementation!r} sees a rank's own tokens: set {PLUG_IN!r}"
            )
        elif len(arguments) > 1 or inputs.get("input_ids") is None or given:
            named = given[0] if given else "positional arguments"
            problem = (
                f"a model under context parallelism takes input_ids and keyword inputs, not {named}: generate outside"
            )
        elif inputs.get("output_router_logits", getattr(model.config, "output_router_logits", False)):
            problem = "the balance loss would be that of a rank's own tokens: set output_router_logits=False"
        elif "sharded_batch" in inputs:
            problem = "the model is sharded already: leave the first context_parallel"
        if problem is not None:
            raise ConfigError(f"{problem}.")

    def _compare(self, tokens: Tensor) -> None:
        """Compare the first batch, as a loader that gives each rank its own is the most likely mistake."""
        if self.compared:
            return
        weights = torch.arange(1, tokens.numel() + 1, device=tokens.device)
        summary = torch.tensor([*tokens.shape, int((tokens.flatten() * weights).sum())], device=tokens.device)
        found = self.cp.channel.all_gather(summary, kind="inputs")
        if any(not torch.equal(one, found[0]) for one in found):
            raise ConfigError(
                "ranks of a context-parallel group got different input_ids: give them all the same batches, as "
                "context_parallel_trainer does."
            )
        self.compared = True


class _AverageLoss:
    """A hook after it: where there are no gradients to be averaged, the loss is averaged at once."""

    def __init__(self, cp: ContextParallel) -> None:
        self.cp = cp

    @eager
    def __call__(self, model: "PreTrainedModel", arguments: Any, output: Any) -> None:
        loss = output.get("loss") if isinstance(output, dict) else None
        if loss is not None and not loss.requires_grad:
            channel = self.cp.channel
            output["loss"] = torch.stack(channel.all_gather(loss[None], kind="loss")).mean()
