"""One step of a tiny `GPTModel` in float64 on a rank: its loss and all gradients, as one process would have them."""

import re
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
    )
    model = model.double().train()
    for name, parameter in model.named_parameters():
        draw(name, parameter, case)
    return model


@torch.no_grad()
def draw(name: str, parameter: Any, case: Case) -> None:
    """Draw a rank's part of a parameter by what it is called in one process."""
    if "local_experts" in name:
        name = expert_names(name, case)[group_of("expert_model_parallel").rank()]
    tensor = group_of("tensor_model_parallel")
    dim, parts = (parameter.partition_dim, tensor.size()) if is_split(parameter) else (0, 1)
    shape = [size * parts if at == dim else size for at, size in enumerate(parameter.shape)]
    whole = 0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(crc32(name.encode())), dtype=torch.float64)
    parameter.copy_(whole.chunk(parts, dim)[tensor.rank() if parts > 1 else 0])


def is_split(parameter: Any) -> bool:
    """Whether tensor-parallel ranks have a part each."""
    return getattr(parameter, "tensor_model_parallel", False)


def expert_names(name: str, case: Case) -> list[str]:
    """What a rank's parameter of an expert is called in one process, for each expert-parallel rank."""
    before, number, after = re.split(r"(?<=local_experts\.)(\d+)", name)
    on_each = CONFIGS[case.config]["num_moe_experts"] // case.ep
    return [f"{before}{rank * on_each + int(number)}{after}" for rank in range(case.ep)]


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
        return [(*of_megatron((tokens, labels), group), None)]
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
    model, total, loss = build(case), sum(tokens.numel() for tokens, _ in sequences(case)), torch.zeros(()).double()
    core, calls = model.decoder.layers[0].self_attention.core_attention, []
    core.register_forward_hook(lambda *_: calls.append(1))
    for tokens, labels, packed in batches(case):
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        logits = model(tokens, positions, None, packed_seq_params=packed)  # [b, s_local, vocabulary]
        part = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED) / total
        part.backward()
        loss += part.detach()
    dist.all_reduce(loss, group=group_of("context_parallel"))
    gradients = {}
    for name, parameter in model.named_parameters():
        gradients |= whole_gradient(name, parameter, case)
    norm = torch.stack([x.square().sum() for x in gradients.values()]).sum().sqrt()
    sent = {} if case.truth else core.context_parallel.traffic.sent
    return {"loss": loss, "norm": norm, "gradients": gradients, "calls": len(calls), "sent": dict(sent)}


def whole_gradient(name: str, parameter: Any, case: Case) -> dict[str, Tensor]:
    """Sum a gradient over context-parallel ranks, and put together the parts of tensor- or expert-parallel ones."""
    assert parameter.grad is not None, name
    gradient = parameter.grad.clone()
    if not getattr(parameter, "allreduce", True):  # an expert, which has seen the tokens of all its ranks
        experts = group_of("expert_model_parallel")
        parts = [torch.empty_like(gradient) for _ in range(experts.size())]
        dist.all_gather(parts, gradient, group=experts)
        return dict(zip(expert_names(name, case), parts, strict=True))
    dist.all_reduce(gradient, group=group_of("context_parallel"))
    tensor = group_of("tensor_model_parallel")
    if is_split(parameter):
        parts = [torch.empty_like(gradient) for _ in range(tensor.size())]
        dist.all_gather(parts, gradient.contiguous(), group=tensor)
        gradient = torch.cat(parts, dim=parameter.partition_dim)
    return {name: gradient}
