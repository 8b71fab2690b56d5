"""The architectures of Hugging Face that farspan computes: their names, and those of their tensors.

Both rotate feature i of a head with feature i + D/2, so that no matrix has to be permuted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from farspan.errors import ConfigError
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.mechanism import Mechanism
from farspan.trainer.model.config import ModelConfig

OUTSIDE_OF_BLOCKS = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
OF_A_BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.query.bias": "self_attn.q_proj.bias",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.key.bias": "self_attn.k_proj.bias",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.value.bias": "self_attn.v_proj.bias",
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
    """name, model_type: in `config.json`. defaults: of transformers, for fields that the file lacks."""

    name: str
    model_type: str
    defaults: Mapping[str, Any]
    qk_norm: bool = False
    qkv_bias: bool = False
    windows: Literal["none", "all layers", "some layers"] = "none"
    """Which layers may have a sliding window."""
    base: float = 1e4
    """Of RoPE where the file has none."""
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


_LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "max_position_embeddings": 2048,
}  # fmt: skip
_MISTRAL = _LLAMA | {
    "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
}  # fmt: skip
_MIXTRAL = _MISTRAL | {
    "rms_norm_eps": 1e-5, "sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.001,
}  # fmt: skip
_QWEN = _LLAMA | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
    "sliding_window": 4096, "use_sliding_window": False,
}  # fmt: skip
_QWEN2 = _QWEN | {"max_window_layers": 28, "layer_types": None}
_QWEN3_MOE = _QWEN | {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_key_value_heads": 4,
    "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001, "decoder_sparse_step": 1, "mlp_only_layers": None,
}  # fmt: skip

LLAMA = Architecture(name="LlamaForCausalLM", model_type="llama", defaults=_LLAMA)
MISTRAL = Architecture(name="MistralForCausalLM", model_type="mistral", defaults=_MISTRAL, windows="all layers")
QWEN2 = Architecture(name="Qwen2ForCausalLM", model_type="qwen2", defaults=_QWEN2, qkv_bias=True, windows="some layers")
QWEN3 = Architecture(
    name="Qwen3ForCausalLM",
    model_type="qwen3",
    defaults=_QWEN2 | {"head_dim": 128},
    qk_norm=True,
    windows="some layers",
)
MIXTRAL = Architecture(
    name="MixtralForCausalLM",
    model_type="mixtral",
    defaults=_MIXTRAL,
    windows="all layers",
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
    defaults=_QWEN3_MOE,
    qk_norm=True,
    windows="all layers",
    expert_count="num_experts",
    expert_size="moe_intermediate_size",
    expert_tensors={
        "feed_forward.router.weight": "mlp.gate.weight",
        "feed_forward.experts.gate.weight": "mlp.experts.{}.gate_proj.weight",
        "feed_forward.experts.up.weight": "mlp.experts.{}.up_proj.weight",
        "feed_forward.experts.down.weight": "mlp.experts.{}.down_proj.weight",
    },
)
ARCHITECTURES = {architecture.name: architecture for architecture in (LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN3_MOE)}


PLUG_IN = "farspan"
"""The field of `config.json` with the mechanisms that no architecture computes, and the attention implementation that
does: that of farspan.integrations.transformers."""


def windows_of(
    architecture: Architecture, model: ModelConfig, mechanisms: Sequence[Mechanism]
) -> list[int | None] | None:
    """Return the sliding window of each layer, None for dense attention; or None where it takes the plug-in."""
    windows = _plain_windows(mechanisms)
    return None if windows is None or _problem(architecture, model, windows) is not None else windows


def _plain_windows(mechanisms: Sequence[Mechanism]) -> list[int | None] | None:
    """Return the sliding window of each layer, None for dense attention; or None where there are other mechanisms."""
    windows = []
    for mechanism in mechanisms:
        mask = mechanism.static_mask
        if mask is None or isinstance(mask.window, tuple) or mask != AttentionMask(window=mask.window):
            return None
        windows.append(mask.window)
    return windows


def architecture_of(
    model: ModelConfig, mechanisms: Sequence[Mechanism], preferred: Architecture | None = None
) -> Architecture:
    """Return `preferred` if it computes this model, or else the simplest that does, with the plug-in if need be.

    Raises ConfigError, which names the setting, where none does.
    """
    problem = None
    # To the plug-in, all layers are dense.
    for windows in (_plain_windows(mechanisms), [None] * model.layers):
        if windows is not None:
            if preferred is not None and _problem(preferred, model, windows) is None:
                return preferred
            nearest = _nearest(model, windows)
            problem = _problem(nearest, model, windows)
            if problem is None:
                return nearest
    raise ConfigError(problem)


def _nearest(model: ModelConfig, windows: Sequence[int | None]) -> Architecture:
    """Return the simplest architecture that may compute this model."""
    if any(model.expert_layers):
        return QWEN3_MOE if model.qk_norm else MIXTRAL
    if model.qk_norm or model.qkv_bias:
        return QWEN3 if model.qk_norm else QWEN2
    return MISTRAL if any(windows) else LLAMA


def _problem(architecture: Architecture, model: ModelConfig, windows: Sequence[int | None]) -> str | None:
    """Return why an architecture does not compute this model; None if it does."""
    required: dict[str, object] = {"parallel_blocks": False, "key_convolution": 0, "head_mixture.kind": "none"}
    required |= {"qk_norm": architecture.qk_norm, "qkv_bias": architecture.qkv_bias}
    if model.rope.rotated != model.head_dim:
        required["rope.rotated"] = 0
    if not architecture.expert_tensors:
        required["experts.count"] = 0
    elif any(model.expert_layers):
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
            return (
                f"model.{name}={value!r} does not exist in {architecture.name}, the Hugging Face architecture nearest "
                f"to this model: only a model that was trained with {supported!r} can be exported."
            )
    if architecture is LLAMA and model.width % model.heads:
        return (
            f"model.heads={model.heads} must divide model.width={model.width} in {LLAMA.name}: only such a model, or "
            "one with model.qk_norm=true, can be exported."
        )
    supported = {"none": 0, "all layers": 1, "some layers": 2}[architecture.windows]
    if any(windows) and (len(set(windows)) > supported or len(set(windows) - {None}) > 1):
        return f"{architecture.name} does not compute these windows."
    return None
