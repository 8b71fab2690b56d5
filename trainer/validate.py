"""Rules between fields: each a small function that raises ConfigError and names the fix."""

import re
from importlib.util import find_spec

from farspan.errors import ConfigError
from farspan.parallel.context_parallel.strategy import STRATEGIES
from farspan.parallel.layout import LAYOUTS
from farspan.parallel.mesh import Degrees
from farspan.registry import nearest_name_hint
from farspan.trainer.build import strategies_of_layers
from farspan.trainer.checkpoint.identity import resume_identity
from farspan.trainer.config import AUTO, Config
from farspan.trainer.data.validation import OWN_SET
from farspan.trainer.engines.deepspeed_settings import check_deepspeed
from farspan.trainer.model.config import ModelConfig, RopeConfig

# The metrics of `code_unigram` would be called as some of `code`.
SET_NAME = re.compile(r"[A-Za-z0-9._-]+(?<!unigram)")


def validate(config: Config, degrees: Degrees) -> None:
    """Check all rules between fields; nothing has been started yet."""
    heads_fit(config.model)
    rope_scaling_is_complete(config.model.rope)
    schedule_fits(config)
    batch_divides(config, degrees)
    layout_exists(config)
    experts_fit(config, degrees)
    head_mixture_fits(config)
    routers_learn(config)
    loads_can_differ(config)
    gates_have_a_recurrence(config)
    accepted_changes_exist(config)
    validation_sets_have_names(config)
    wandb_is_installed(config)
    profile_fits(config, degrees)
    mechanism_takes_model(config)
    strategy_takes_mechanism(config, degrees)
    check_deepspeed(config, degrees)


def accepted_changes_exist(config: Config) -> None:
    names = resume_identity(config, "")
    for name in config.checkpoint.accept_changed:
        if name not in names:
            raise ConfigError(
                f"checkpoint.accept_changed={name!r} is not a setting that a run must share with its checkpoint, as "
                f"data.folder, attention.mechanism (with its options) and model.layers are."
                f"{nearest_name_hint(name, list(names))}"
            )


def validation_sets_have_names(config: Config) -> None:
    for name in config.evaluate.sets:
        if not SET_NAME.fullmatch(name) or name == OWN_SET:
            raise ConfigError(
                f"evaluate.sets.{name} cannot name metrics: use letters, digits, dots, underscores, hyphens, and not "
                f"{OWN_SET!r}, which is the split of the training data, nor a name that ends in 'unigram'."
            )


def wandb_is_installed(config: Config) -> None:
    if config.metrics.wandb_project is not None and find_spec("wandb") is None:
        raise ConfigError(
            f"metrics.wandb_project={config.metrics.wandb_project!r} needs a package that is not installed: run "
            "`pip install 'farspan[wandb]'`, or set metrics.wandb_project=none."
        )


def profile_fits(config: Config, degrees: Degrees) -> None:
    profile, ranks = config.profile, degrees.data * degrees.context
    for step in profile.steps:
        if step > config.train.steps:
            raise ConfigError(
                f"profile.steps has {step}, but the run ends at train.steps={config.train.steps}: choose earlier steps."
            )
    for rank in profile.ranks:
        if rank >= ranks:
            raise ConfigError(f"profile.ranks has {rank}, but the run has the ranks 0 to {ranks - 1}: choose of these.")
    if profile.steps and not profile.ranks:
        raise ConfigError("profile.ranks=[] profiles nothing: name ranks, such as [0], or set profile.steps=[].")
    if profile.memory and not profile.steps:
        raise ConfigError("profile.memory=true is for the steps of profile.steps, but profile.steps=[]: choose some.")


def heads_fit(model: ModelConfig) -> None:
    rotated = model.rope.rotated
    if model.heads % model.kv_heads:
        raise ConfigError(
            f"model.kv_heads={model.kv_heads} must divide model.heads={model.heads}: "
            f"{', '.join(str(n) for n in range(1, model.heads + 1) if model.heads % n == 0)} do."
        )
    if model.head_dim % 2:
        raise ConfigError(f"model.head_dim={model.head_dim} must be even: rotary embedding turns pairs.")
    if rotated % 2 or rotated > model.head_dim:
        raise ConfigError(
            f"model.rope.rotated={rotated} must be even and at most model.head_dim={model.head_dim}: rotary embedding "
            "turns pairs of a head's numbers. 0 turns all."
        )


def rope_scaling_is_complete(rope: RopeConfig) -> None:
    if rope.scaling == "none" and rope.factor != 1.0:
        raise ConfigError(f"model.rope.factor={rope.factor} needs model.rope.scaling: set it to llama3 or yarn.")
    if rope.scaling != "none" and rope.factor == 1.0:
        raise ConfigError(
            f"model.rope.scaling={rope.scaling!r} does nothing with model.rope.factor={rope.factor}: set "
            "model.rope.factor to how many times longer than model.rope.original_positions the context is."
        )
    if rope.scaling == "llama3" and rope.low_frequency_factor >= rope.high_frequency_factor:
        raise ConfigError(
            f"model.rope.low_frequency_factor={rope.low_frequency_factor} must be below "
            f"model.rope.high_frequency_factor={rope.high_frequency_factor}."
        )
    if rope.scaling == "yarn" and rope.beta_slow >= rope.beta_fast:
        raise ConfigError(f"model.rope.beta_slow={rope.beta_slow} must be below model.rope.beta_fast={rope.beta_fast}.")


def schedule_fits(config: Config) -> None:
    optimizer, steps = config.optimizer, config.train.steps
    warmup, decay_steps = optimizer.warmup_steps, optimizer.decay_steps(steps)
    most = steps - decay_steps if optimizer.schedule == "wsd" else steps
    shorter = f"set optimizer.warmup_steps={most}{' or less' if most else ''}"
    if warmup > steps:
        raise ConfigError(
            f"optimizer.warmup_steps={warmup} exceeds train.steps={steps}: the peak learning rate would never be "
            f"reached; {shorter}."
        )
    if warmup > most:
        raise ConfigError(
            f"optimizer.warmup_steps={warmup} and a decay over the last {decay_steps} steps "
            f"(optimizer.decay_fraction={optimizer.decay_fraction}) overlap in train.steps={steps}: {shorter}, or "
            "lower optimizer.decay_fraction."
        )


def batch_divides(config: Config, degrees: Degrees) -> None:
    sequences = config.train.sequences_per_step
    if sequences % degrees.data:
        nearest = -(-sequences // degrees.data) * degrees.data
        raise ConfigError(
            f"train.sequences_per_step={sequences} must be a multiple of the {degrees.data} data-parallel groups "
            f"(dp_replicate x dp_shard); {nearest} is."
        )


def experts_fit(config: Config, degrees: Degrees) -> None:
    experts, layers = config.model.experts, config.model.expert_layers
    if not experts.count:
        if degrees.expert > 1:
            raise ConfigError(f"parallel.expert={degrees.expert} shards experts, but model.experts.count=0: set one.")
        return
    if not any(layers):
        raise ConfigError(
            f"no layer has the experts of model.experts.count={experts.count}: change model.experts.layers="
            f"{experts.layers!r}, or set model.experts.count=0."
        )
    if not experts.feed_forward:
        raise ConfigError("model.experts.feed_forward=0 leaves experts without a size: set it.")
    try:
        experts.build_router()
    except ValueError as error:
        raise ConfigError(f"model.experts does not fit together: {error}.") from None
    if experts.choice == "experts":
        idle_options = {
            "capacity": 0.0, "groups": 1, "group_score_top_k": 0, "bias_rate": 0.0, "balance_loss": 0.0,
            "normalized": False,
        }  # fmt: skip
        for name, idle in idle_options.items():
            if getattr(experts, name) != idle:
                raise ConfigError(
                    f"model.experts.{name}={getattr(experts, name)} is for tokens that choose, but "
                    f"model.experts.choice='experts': set it to {str(idle).lower()}, or choice='tokens'."
                )
    if experts.count % degrees.expert:
        raise ConfigError(
            f"parallel.expert={degrees.expert} must divide model.experts.count={experts.count}: change one of them."
        )
    shards = degrees.shard // degrees.expert
    for name, size in (("model.experts.feed_forward", experts.feed_forward), ("model.width", config.model.width)):
        if size % shards:
            raise ConfigError(
                f"{name}={size} must be a multiple of the {shards} ranks that share the same experts (dp_shard "
                "x context / expert): raise parallel.expert, or change it."
            )


def head_mixture_fits(config: Config) -> None:
    model, mixture = config.model, config.model.head_mixture
    for name, idle, kind in (("count", 0, "experts"), ("normalized", True, "experts"), ("shared", 0, "heads")):
        if mixture.kind not in ("none", kind) and getattr(mixture, name) != idle:
            raise ConfigError(
                f"model.head_mixture.{name}={str(getattr(mixture, name)).lower()} is for kind={kind!r}, but "
                f"model.head_mixture.kind={mixture.kind!r}: set it to {str(idle).lower()}, or change kind."
            )
    try:
        model.build_head_router()
    except ValueError as error:
        raise ConfigError(f"model.head_mixture does not fit together: {error}.") from None
    if mixture.own_keys and (mixture.kind != "experts" or mixture.per_token < mixture.count):
        raise ConfigError(
            f"model.head_mixture.own_keys=true is for kind='experts' and tokens that choose all of them: set kind and "
            f"per_token={mixture.count}, or own_keys=false."
        )
    if mixture.kind == "none":
        return
    if model.qkv_bias:
        raise ConfigError(
            f"model.qkv_bias=true is not computed for heads that tokens choose: set it to false, or "
            f"model.head_mixture.kind='none' in place of {mixture.kind!r}."
        )
    mixing = [mechanism for mechanism in dict.fromkeys(config.mechanisms()) if model.mixes_heads(mechanism)]
    if not mixing:
        raise ConfigError(
            f"model.head_mixture.kind={mixture.kind!r} is in no layer: attention.mechanism="
            f"{config.attention.mechanism!r} with model.recurrent_layer='gated' has gated ones only. Add another "
            "mechanism, or set model.head_mixture.kind='none'."
        )
    if mixture.per_token == mixture.count:
        return
    if any(mechanism.heads_differ for mechanism in mixing):
        raise ConfigError(
            f"attention.mechanism={config.attention.mechanism!r} treats query heads differently by their number, "
            "which heads that tokens choose do not keep: set model.head_mixture.kind='none', or choose another "
            "mechanism."
        )


def routers_learn(config: Config) -> None:
    """Refuse routers whose weights are 1 whatever their logits are: the loss has no gradient for them."""
    experts, mixture = config.model.experts, config.model.head_mixture
    if experts.count and experts.per_token == 1 and experts.normalized:
        raise ConfigError(
            "model.experts.normalized=true with model.experts.per_token=1 divides each weight by itself, so that the "
            "loss does not train the router: set normalized=false, or per_token=2 or more."
        )
    if experts.count == 1 and experts.score == "softmax":
        raise ConfigError(
            "model.experts.count=1 with score='softmax' gives every token the weight 1, so that the loss does not "
            "train the router: set count=2 or more, or 0 for dense layers."
        )
    if mixture.kind == "experts" and mixture.count == 1:
        raise ConfigError(
            "model.head_mixture.count=1 gives every token the weight 1, so that the loss does not train the router: "
            "set count=2 or more, or kind='none'."
        )
    if mixture.kind == "heads" and config.model.kv_heads * mixture.per_token == 1:
        raise ConfigError(
            "model.head_mixture.per_token=1 with model.kv_heads=1 chooses one head in all, whose weight is divided by "
            "itself, so that the loss does not train the router: set per_token=2 or more, or kind='experts'."
        )


def loads_can_differ(config: Config) -> None:
    """Refuse what evens out loads that are equal anyway: the balance loss would be constant, the biases never move."""
    model, experts, mixture = config.model, config.model.experts, config.model.head_mixture
    candidates = mixture.count if mixture.kind == "experts" else model.heads // model.kv_heads - mixture.shared
    for name, settings, takes_all in (
        ("experts", experts, experts.per_token == experts.count and experts.choice == "tokens"),
        ("head_mixture", mixture, mixture.kind != "none" and mixture.per_token == candidates),
    ):
        for key in ("balance_loss", "bias_rate"):
            if takes_all and getattr(settings, key):
                raise ConfigError(
                    f"model.{name}.{key}={getattr(settings, key)} evens out loads, but with model.{name}.per_token="
                    f"{settings.per_token} every token takes all of them: set it to 0, or lower per_token."
                )


def layout_exists(config: Config) -> None:
    layout = config.parallel.layout
    if layout not in LAYOUTS:
        hint = nearest_name_hint(layout, list(LAYOUTS))
        raise ConfigError(f"parallel.layout={layout!r} does not exist; choose one of {', '.join(LAYOUTS)}.{hint}")


def gates_have_a_recurrence(config: Config) -> None:
    model = config.model
    if model.recurrent_layer == "gated" and not any(model.is_gated(mechanism) for mechanism in config.mechanisms()):
        raise ConfigError(
            f"model.recurrent_layer='gated' is in no layer: attention.mechanism={config.attention.mechanism!r} has no "
            "recurrence, such as lightning. Add one, or set model.recurrent_layer=plain."
        )


def mechanism_takes_model(config: Config) -> None:
    for mechanism in dict.fromkeys(config.mechanisms()):
        unsupported_reason = mechanism.unsupported_reason(config.model.heads_of(mechanism), config.data.sequence_tokens)
        if unsupported_reason is not None:
            raise ConfigError(
                f"attention.mechanism={config.attention.mechanism!r} does not support this run: {unsupported_reason}."
            )


def strategy_takes_mechanism(config: Config, degrees: Degrees) -> None:
    parallel = config.parallel
    if parallel.strategy == AUTO:
        return
    for mechanism, name in dict.fromkeys(zip(config.mechanisms(), strategies_of_layers(config, degrees), strict=True)):
        unsupported_reason = STRATEGIES.get(name).unsupported_reason(
            mechanism, config.model.heads_of(mechanism), degrees.context, parallel.context_inner
        )
        if unsupported_reason is not None:
            raise ConfigError(
                f"parallel.strategy={parallel.strategy!r} does not support this run: {unsupported_reason}"
            )
