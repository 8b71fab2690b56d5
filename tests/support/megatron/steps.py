"""One step of a tiny `GPTModel` in float64 on a rank: its loss and all gradients, as one process would have them."""

import re
from collections.abc import Iterator
from functools import partial
from inspect import signature
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor, nn

import farspan
from farspan.integrations.megatron import layer_spec, packed_seq_params, shard
from tests.support.megatron.cases import CONFIGS, DOCUMENTS, MOBA, RECOMPUTED, Case

SEQUENCES, TOKENS, VOCABULARY, LAYERS = 2, 64, 48, 2
IGNORED = -100
Step = dict[str, Any]


class ReferenceMoBA(nn.Module):
    """MoBA over whole sequences, from its definition: every head of every query by itself."""

    def __init__(self, *, layers: range, layer_number: int, softmax_scale: float | None, **_: Any) -> None:
        super().__init__()
        self.dense, self.scale = layer_number not in layers, softmax_scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))  # [s, b, heads, d] -> [b, heads, s, d]
        tokens = q.shape[2]
        visible = torch.ones(tokens, tokens).tril().bool().expand(*q.shape[:2], -1, -1)
        if not self.dense:
            block = torch.arange(tokens) // MOBA["block"]
            means = torch.stack(
                [part.mean(2) for part in k.split(MOBA["block"], dim=2)], dim=2
            )  # [b, heads, blocks, d]
            numbers = torch.arange(means.shape[2])
            scores = (q @ means.mT).masked_fill(numbers >= block[:, None], -torch.inf)
            scores = scores.masked_fill(numbers == block[:, None], torch.inf)
            best, chosen = scores.topk(min(MOBA["top_k"], len(numbers)))
            selected = torch.zeros_like(scores).scatter(3, chosen, (best > -torch.inf).double()).bool()
            visible = visible & selected[..., block]  # [b, heads, s, blocks] -> [b, heads, s, s]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=self.scale)
        return out.permute(2, 0, 1, 3).flatten(2)  # [b, heads, s, d] -> [s, b, heads * d]


def group_of(kind: str) -> Any:
    """Megatron's group of this rank."""
    return getattr(parallel_state, f"get_{kind}_group")()


def build(case: Case) -> Any:
    """Build the model, with the same parameters on any number of ranks."""
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        use_cpu_initialization=True,
        params_dtype=torch.float64,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        context_parallel_size=case.cp,
        tensor_model_parallel_size=case.tp,
        expert_model_parallel_size=case.ep,
        pipeline_model_parallel_size=case.pp,
        pipeline_dtype=torch.float64,
        **CONFIGS[case.config],
        **RECOMPUTED.get(case.recompute, {}),
    )
    spec: Any = get_gpt_layer_local_spec(num_experts=config.num_moe_experts)
    moba = farspan.mechanism("moba", **MOBA)
    if not case.truth:
        mechanism = {"dense": "dense", "moba": lambda layer: moba, "mixed": ["dense", moba]}[case.mechanism]
        spec = layer_spec(mechanism, case.strategy, base_spec=spec)
    elif case.mechanism != "dense":  # Megatron's own attention is the truth of dense
        layers = range(1 if case.mechanism == "moba" else 2, LAYERS + 1)
        spec.submodules.self_attention.submodules.core_attention = ModuleSpec(
            module=ReferenceMoBA, params={"layers": layers}
        )
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=VOCABULARY,
        max_sequence_length=TOKENS,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        parallel_output=False,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    model = model.double().train()
    for name, parameter in model.named_parameters():
        draw(name, parameter, case)
    return model


@torch.no_grad()
def draw(name: str, parameter: Any, case: Case) -> None:
    """Draw a rank's part of a parameter by what it is called in one process."""
    name = names_alone(name, case)[group_of("expert_model_parallel").rank()]
    tensor = group_of("tensor_model_parallel")
    dim, parts = (parameter.partition_dim, tensor.size()) if is_split(parameter) else (0, 1)
    shape = [size * parts if at == dim else size for at, size in enumerate(parameter.shape)]
    whole = 0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(crc32(name.encode())), dtype=torch.float64)
    parameter.copy_(whole.chunk(parts, dim)[tensor.rank() if parts > 1 else 0])


def is_split(parameter: Any) -> bool:
    """Whether tensor-parallel ranks have a part each."""
    return getattr(parameter, "tensor_model_parallel", False)


def names_alone(name: str, case: Case) -> list[str]:
    """What a rank's parameter is called in one process, for each expert-parallel rank."""
    name = renumbered(name, "layers", group_of("pipeline_model_parallel").rank() * LAYERS // case.pp)
    on_each = CONFIGS[case.config].get("num_moe_experts", 0) // case.ep
    return [renumbered(name, "local_experts", rank * on_each) for rank in range(case.ep)]


def renumbered(name: str, modules: str, first: int) -> str:
    """Count the modules of a list from another number than 0."""
    return re.sub(rf"(?<={modules}\.)\d+", lambda match: str(int(match[0]) + first), name)


def sequences(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Tokens and labels, `[1, tokens]`, of each sequence that sees nothing of the others."""
    generator = torch.Generator().manual_seed(4)
    lengths = DOCUMENTS if case.packed else (TOKENS,) * SEQUENCES
    drawn = [torch.randint(VOCABULARY, (1, length + 1), generator=generator) for length in lengths]
    return [(x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in drawn]


def batches(case: Case) -> list[tuple[Tensor, Tensor, Any]]:
    """The inputs of this rank: tokens and labels `[b, s_local]`, and the parameters of what is packed."""
    all_sequences = sequences(case)
    if case.truth:
        return [(*one, None) for one in all_sequences]
    group: Any = group_of("context_parallel")
    if case.hybrid:
        group = parallel_state.get_hybrid_data_context_parallel_groups(group_size=2)
        tokens, labels = of_megatron(all_sequences[dist.get_rank() // 2], group)
        hybrid = {"qkv_format": "sbhd", "cp_group": group, "local_cp_size": 2}
        return [(tokens, labels, PackedSeqParams(max_seqlen_q=TOKENS, max_seqlen_kv=TOKENS, **hybrid))]
    tokens, labels = (torch.cat(x, dim=int(case.packed)) for x in zip(*all_sequences, strict=True))
    if not case.packed:
        tokens, labels = of_megatron((tokens, labels), group)
        # Stages of a pipeline work on a sequence each.
        size = 1 if case.pp > 1 else SEQUENCES
        return [(*one, None) for one in zip(tokens.split(size), labels.split(size), strict=True)]
    packed = packed_seq_params(DOCUMENTS, pad_to_multiple_of=2 * case.cp)
    tokens, labels = (shard(x, packed, group=group, dim=1, fill=fill) for x, fill in ((tokens, 0), (labels, IGNORED)))
    return [(tokens, labels, packed)]


def of_megatron(tensors: tuple[Tensor, Tensor], group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Shard tokens and labels as Megatron's data loaders do."""
    hybrid = {"is_hybrid_cp": False} if "is_hybrid_cp" in signature(get_batch_on_this_cp_rank).parameters else {}
    batch = get_batch_on_this_cp_rank(dict(zip(("tokens", "labels"), tensors, strict=True)), cp_group=group, **hybrid)
    return batch["tokens"], batch["labels"]


def train_step(case: Case) -> Step:
    """Return loss, norm and gradients, named as in one process, and the first attention's calls and bytes."""
    model, inputs = build(case), batches(case)
    total = sum(tokens.numel() for tokens, _ in sequences(case))
    core, calls = model.decoder.layers[0].self_attention.core_attention, []
    core.register_forward_hook(lambda *_: calls.append(1))

    def forward(batch: Iterator[Any], model: Any) -> tuple[Tensor, Any]:
        tokens, labels, packed = next(batch)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        logits = model(tokens, positions, None, packed_seq_params=packed)  # [b, s_local, vocabulary]
        return logits, partial(loss_of, labels)

    def loss_of(labels: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED)
        # Schedules multiply by the ranks, and take the mean of batches.
        return each / total * len(inputs) / case.cp, each.detach() / total

    parts = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(inputs),
        model=model,
        num_microbatches=len(inputs),
        seq_length=inputs[0][0].shape[1] * case.cp,
        micro_batch_size=inputs[0][0].shape[0],
    )
    loss = sum(parts, torch.zeros((), dtype=torch.float64))
    dist.all_reduce(loss, group=group_of("context_parallel"))
    gradients = {}
    for name, parameter in model.named_parameters():
        gradients |= whole_gradient(name, parameter, case)
    stages: list[Any] = [None] * case.pp
    dist.all_gather_object(stages, (loss, gradients), group=group_of("pipeline_model_parallel"))
    loss, gradients = stages[-1][0], {name: x for _, of_stage in stages for name, x in of_stage.items()}
    norm = torch.stack([x.square().sum() for x in gradients.values()]).sum().sqrt()
    sent = {} if case.truth else core.context_parallel.traffic.sent
    return {"loss": loss, "norm": norm, "gradients": gradients, "calls": len(calls) // len(inputs), "sent": dict(sent)}


def whole_gradient(name: str, parameter: Any, case: Case) -> dict[str, Tensor]:
    """Sum a gradient over context-parallel ranks, and put together the parts of tensor- or expert-parallel ones."""
    assert parameter.grad is not None, name
    gradient = parameter.grad.clone()
    if not getattr(parameter, "allreduce", True):  # an expert, which has seen the tokens of all its ranks
        experts = group_of("expert_model_parallel")
        parts = [torch.empty_like(gradient) for _ in range(experts.size())]
        dist.all_gather(parts, gradient, group=experts)
        return dict(zip(names_alone(name, case), parts, strict=True))
    dist.all_reduce(gradient, group=group_of("context_parallel"))
    tensor = group_of("tensor_model_parallel")
    if is_split(parameter):
        parts = [torch.empty_like(gradient) for _ in range(tensor.size())]
        dist.all_gather(parts, gradient.contiguous(), group=tensor)
        gradient = torch.cat(parts, dim=parameter.partition_dim)
    return {names_alone(name, case)[0]: gradient}
