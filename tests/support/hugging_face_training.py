"""Ten steps of a tiny Llama in float64, in one process or on the ranks of a group, for tests of the plug-in."""

import os
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import farspan.integrations.transformers as plug_in
from farspan.errors import ConfigError

LENGTH, STEPS = 50, 10
"""Four chunks of a zigzag of this length are padded."""


def tiny_llama(entry: dict[str, Any] | None) -> Any:
    """A model in float64 with the mechanism of `entry`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    plug_in.register()
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, initializer_range=0.1, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    if entry is not None:
        config.farspan = entry
    model = LlamaForCausalLM._from_config(config, attn_implementation="farspan").double()
    model.loss_function = float64_loss
    return model


def float64_loss(
    logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, **others: Any
) -> Tensor:
    """The loss of causal models in transformers, which would round logits to float32."""
    targets = others.get("shift_labels")
    targets = F.pad(labels[:, 1:], (0, 1), value=-100) if targets is None else targets
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def samples() -> list[dict[str, Tensor]]:
    """Two for each step, with different numbers of labels."""
    generator, found = torch.Generator().manual_seed(8), []
    for number in range(2 * STEPS):
        ids = torch.randint(1, 96, (LENGTH,), generator=generator)
        found.append({"input_ids": ids, "labels": ids.masked_fill(torch.arange(LENGTH) < 3 * (number % 5), -100)})
    return found


def mean_over_ranks(loss: Tensor) -> float:
    total = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return float(total)


def world() -> dict[str, str]:
    """The environment of this rank, from which accelerate reads the world."""
    rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
    return {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}


def train(entry: dict[str, Any] | None, strategy: str | None, packed: bool = False, scale: float = 1.0) -> list[float]:
    """Train by a plain loop, with padding or with packed documents; return the losses.

    scale: what gradients are multiplied with, a bug.
    """
    model, data, losses = tiny_llama(entry), samples(), []
    sharded = nullcontext() if strategy is None else plug_in.context_parallel(model, dist.group.WORLD, strategy)  # pyright: ignore
    trained = model if strategy is None else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    positions = torch.cat((torch.arange(19), torch.arange(LENGTH - 19)))
    with sharded:
        for step in range(STEPS):
            batch = {name: torch.stack([one[name] for one in data[2 * step : 2 * step + 2]]) for name in data[0]}
            if packed:
                model.gradient_checkpointing_enable()
                batch["position_ids"] = positions.repeat(2, 1)
            else:
                # The last tokens of the first sequence are padding.
                batch["attention_mask"] = (torch.arange(LENGTH) < torch.tensor([[LENGTH - 7], [LENGTH]])).long()
                batch["labels"][0, -7:] = -100
            loss = trained(**batch).loss
            optimizer.zero_grad()
            (loss * scale).backward()
            optimizer.step()
            losses.append(mean_over_ranks(loss))
    return losses


def train_with_trainer(entry: dict[str, Any] | None, strategy: str | None, folder: str) -> tuple[list[float], float]:
    """Train by Trainer; return the losses and norms of gradients of all steps, and the loss of an evaluation."""
    from transformers import Trainer, TrainingArguments

    class RecordingTrainer(Trainer):
        def training_step(self, *arguments: Any, **named: Any) -> Tensor:
            # What is logged has been rounded to float32.
            loss = super().training_step(*arguments, **named)
            losses.append(mean_over_ranks(loss))
            return loss

    losses: list[float] = []
    with patch.dict(os.environ, {} if strategy is None else world()):
        arguments = TrainingArguments(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=2, per_device_eval_batch_size=2,
            learning_rate=0.1, lr_scheduler_type="constant", optim="sgd", max_grad_norm=1e9, use_cpu=True,
            logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, log_level="error",
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = RecordingTrainer(tiny_llama(entry), arguments, train_dataset=samples(), eval_dataset=samples()[:4])
        group = dist.group.WORLD
        shared = nullcontext() if strategy is None else plug_in.context_parallel_trainer(trainer, group, strategy)  # pyright: ignore
        with shared:
            trainer.train()
            evaluated = trainer.evaluate()["eval_loss"]
    norms = [record["grad_norm"] for record in trainer.state.log_history if "loss" in record]
    return losses + norms, evaluated


def train_with_accelerate(entry: dict[str, Any] | None, strategy: str | None) -> list[float]:
    """Train by a loop of accelerate that accumulates gradients and clips; return losses and norms of gradients."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    found: list[float] = []
    with patch.dict(os.environ, {} if strategy is None else world()):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, data = tiny_llama(entry), samples()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trained = accelerator.prepare(model)
        group = dist.group.WORLD
        with nullcontext() if strategy is None else plug_in.context_parallel(model, group, strategy):  # pyright: ignore
            for step in range(STEPS):
                batch = {name: torch.stack([one[name] for one in data[2 * step : 2 * step + 2]]) for name in data[0]}
                with accelerator.accumulate(trained):
                    loss = trained(**batch).loss
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        norm: Any = accelerator.clip_grad_norm_(trained.parameters(), 0.5)
                        found.append(float(norm))
                        optimizer.step()
                        optimizer.zero_grad()
                found.append(mean_over_ranks(loss))
        AcceleratorState._reset_state(reset_partial_state=True)
    return found


def refusals() -> list[str]:
    """On a rank: what is said of other batches, of generation, and of another implementation."""
    found, ids = [], torch.ones(1, 16, dtype=torch.int64)
    model = tiny_llama(None)

    def attempt(use: Any) -> None:
        try:
            with plug_in.context_parallel(model, dist.group.WORLD, "ring"):  # pyright: ignore
                use()
        except ConfigError as error:
            found.append(str(error))

    attempt(lambda: model(ids * (1 + dist.get_rank())))
    attempt(lambda: model.generate(ids, max_new_tokens=2))
    attempt(lambda: model.generate(ids, max_new_tokens=2, use_cache=False))
    model.set_attn_implementation("sdpa")
    attempt(lambda: model(ids))
    return found
