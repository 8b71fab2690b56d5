"""The architectures of Hugging Face that farspan computes: their names, and those of their tensors.

Both rotate feature i of a head with feature i + D/2, so that no matrix has to be permuted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from farspan.errors import ConfigError
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.mechanisms.dense import Dense
from farspan.trainer.model.config import ModelConfig

OUTSIDE_OF_BLOCKS = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
OF_A_BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "attention.query_norm.weight": "self_attn.q_norm.weight",
    "attention.key_norm.weight": "self_attn.k_norm.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.gate.weight": "mlp.gate_proj.weight",
    "feed_forward.up.weight": "mlp.up_proj.weight",
    "feed_forward.down.weight": "mlp.down_proj.weight",
}


class FusedTensor(NamedTuple):
    """A tensor of all experts; half 0 or 1: the first or second half of its rows `[E, 2 * rows, in]`, None: all."""

    tensor: str
    half: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """name, model_type: in `config.json`. base: of RoPE where the file has none."""

    name: str
    model_type: str
    qk_norm: bool
    base: float
    expert_count: str = ""
    """Field of `config.json`; newer versions of transformers call it num_local_experts everywhere."""
    expert_size: str = ""
    """Field of `config.json`."""
    expert_tensors: dict[str, str] = field(default_factory=dict)
    """Names of the parameters of a mixture in a block; {} stands for the expert's number. Empty without experts."""

    def tensors_of(self, parameter: str, experts: int) -> list[str]:
        """Return the tensors of a parameter: one or, to be stacked, one for each expert."""
        if parameter in OUTSIDE_OF_BLOCKS:
            return [OUTSIDE_OF_BLOCKS[parameter]]
        _, layer, part = parameter.split(".", 2)
        tensor = f"model.layers.{layer}.{(OF_A_BLOCK | self.expert_tensors)[part]}"
        return [tensor.format(expert) for expert in range(experts)] if "{}" in tensor else [tensor]

    @staticmethod
    def fused_tensor_of(parameter: str) -> FusedTensor | None:
        """Return the tensor of a mixture's parameter in files that keep the layout of transformers 5."""
        layer, part = parameter.split(".", 2)[1:] if parameter.startswith("blocks.") else ("", "")
        mixture = f"model.layers.{layer}.mlp."
        return {
            "feed_forward.router.weight": FusedTensor(f"{mixture}gate.weight", None),
            "feed_forward.experts.gate.weight": FusedTensor(f"{mixture}experts.gate_up_proj", 0),
            "feed_forward.experts.up.weight": FusedTensor(f"{mixture}experts.gate_up_proj", 1),
            "feed_forward.experts.down.weight": FusedTensor(f"{mixture}experts.down_proj", None),
        }.get(part)


LLAMA = Architecture(name="LlamaForCausalLM", model_type="llama", qk_norm=False, base=1e4)
QWEN3 = Architecture(name="Qwen3ForCausalLM", model_type="qwen3", qk_norm=True, base=1e4)
MIXTRAL = Architecture(
    name="MixtralForCausalLM",
    model_type="mixtral",
    qk_norm=False,
    base=1e6,
    expert_count="num_local_experts",
    expert_size="intermediate_size",
    expert_tensors={
        "feed_forward.router.weight": "block_sparse_moe.gate.weight",
        "feed_forward.experts.gate.weight": "block_sparse_moe.experts.{}.w1.weight",
        "feed_forward.experts.up.weight": "block_sparse_moe.experts.{}.w3.weight",
        "feed_forward.experts.down.weight": "block_sparse_moe.experts.{}.w2.weight",
    },
)
QWEN3_MOE = Architecture(
    name="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    qk_norm=True,
    base=1e4,
    expert_count="num_experts",
    expert_size="moe_intermediate_size",
    expert_tensors={
        "feed_forward.router.weight": "mlp.gate.weight",
        "feed_forward.experts.gate.weight": "mlp.experts.{}.gate_proj.weight",
        "feed_forward.experts.up.weight": "mlp.experts.{}.up_proj.weight",
        "feed_forward.experts.down.weight": "mlp.experts.{}.down_proj.weight",
    },
)
ARCHITECTURES = {architecture.name: architecture for architecture in (LLAMA, QWEN3, MIXTRAL, QWEN3_MOE)}


def architecture_of(model: ModelConfig, mechanisms: Sequence[Mechanism]) -> Architecture:
    """Raises ConfigError, which names the setting, where no architecture computes this model."""
    for mechanism in mechanisms:
        if mechanism != Dense():
            raise ConfigError(
                f"attention.mechanism has {mechanism}, which none of {', '.join(ARCHITECTURES)} computes: train with "
                "attention.mechanism=dense before an export."
            )
    has_experts = any(model.expert_layers)
    architecture = {(False, False): LLAMA, (False, True): QWEN3, (True, False): MIXTRAL, (True, True): QWEN3_MOE}[
        has_experts, model.qk_norm
    ]
    required: dict[str, object] = {"parallel_blocks": False, "key_convolution": 0, "head_mixture.kind": "none"}
    if model.rope.rotated != model.head_dim:
        required["rope.rotated"] = 0
    if has_experts:
        required |= {"experts.shared": 0, "experts.choice": "tokens", "experts.capacity": 0.0, "experts.bias_rate": 0.0}
        required |= {"experts.score": "softmax", "experts.scale": 1.0}
        if model.experts.groups_per_token != model.experts.groups:
            required["experts.groups"] = 1
    if architecture is MIXTRAL:
        required["experts.normalized"] = True
        if not all(model.expert_layers):
            required["experts.layers"] = "experts"
    for name, supported in required.items():
        value = attrgetter(name)(model)
        if value != supported:
            raise ConfigError(
                f"model.{name}={value!r} does not exist in {architecture.name}, the Hugging Face architecture nearest "
                f"to this model: only a model that was trained with {supported!r} can be exported."
            )
    if architecture is LLAMA and model.width % model.heads:
        raise ConfigError(
            f"model.heads={model.heads} must divide model.width={model.width} in {LLAMA.name}: only such a model, or "
            "one with model.qk_norm=true, can be exported."
        )
    return architecture
