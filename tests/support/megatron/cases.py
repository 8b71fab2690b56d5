"""What `GPTModel` is trained with by ranks of tests: imports no Megatron."""

from dataclasses import dataclass

DOCUMENTS = (21, 5, 34)
"""Packed in a sequence; none fills the chunks that ranks share."""
MOBA = {"block": 8, "top_k": 2}


RECOMPUTED = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective"},
}
CONFIGS = {
    "": {},
    "window": {"window_size": (6, 0), "window_attn_skip_freq": [1, 0]},
    "scale": {"softmax_scale": 0.5},
    "experts": {
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp64",
        "moe_token_dispatcher_type": "alltoall",
        "add_bias_linear": False,
    },
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """mechanism: dense, moba, or mixed, dense in the first layer and MoBA in the second. config, recompute: above.

    hybrid: whether pairs of the context-parallel ranks take a sequence each. truth: whether it is computed without
    farspan, sequence by sequence, in one process.
    """

    mechanism: str = "dense"
    packed: bool = False
    strategy: str = "ring"
    cp: int = 1
    tp: int = 1
    ep: int = 1
    pp: int = 1
    hybrid: bool = False
    config: str = ""
    recompute: str = ""
    truth: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        return {"tp": self.tp, "cp": self.cp, "ep": self.ep, "pp": self.pp}

    @property
    def name(self) -> str:
        sizes = [f"{key}{size}" for key, size in self.sizes.items() if size > 1]
        options = [option for option in ("hybrid" * self.hybrid, self.config, self.recompute) if option]
        return "-".join([self.mechanism, "thd" if self.packed else "sbhd", self.strategy, *sizes, *options])

    @property
    def alone(self) -> "Case":
        """What it is compared with, which no recomputation changes."""
        return Case(mechanism=self.mechanism, packed=self.packed, config=self.config, truth=True)


CASES = [
    *(
        Case(mechanism=mechanism, packed=packed, cp=cp, tp=tp)
        for mechanism in ("dense", "moba")
        for packed in (False, True)
        for cp, tp in ((1, 1), (2, 1), (4, 1), (2, 2))
    ),
    *(
        Case(mechanism=mechanism, packed=packed, strategy=strategy, cp=2, tp=tp)
        for mechanism in ("dense", "moba")
        for strategy in ("ulysses", "gather", "fetch", "auto")
        for packed, tp in ((False, 1), (True, 2))
    ),
    Case(mechanism="mixed", packed=True, strategy="gather", cp=2),
    Case(mechanism="moba", cp=4, hybrid=True),
    Case(cp=2, config="window"),
    Case(mechanism="moba", cp=2, tp=2, config="scale"),
    Case(config="scale"),
    Case(mechanism="moba", cp=2, recompute="full"),
    Case(mechanism="moba", packed=True, cp=2, recompute="selective"),
    Case(mechanism="mixed", cp=2, pp=2),
    Case(mechanism="moba", packed=True, cp=2, pp=2),
    Case(cp=2, ep=2, config="experts"),
]

CHECKS = [
    "options_that_attention_lacks_are_refused",
    "mechanisms_that_do_not_fit_are_refused",
    "windows_narrow_dense_attention_only",
    "masks_are_those_of_the_mechanism",
    "mechanisms_go_by_the_number_of_their_layer",
    "packed_documents_lie_zigzag_each",
    "the_device_is_asked_once_for_lengths",
    "a_batch_of_one_rank_stays_on_it",
    "layers_share_plans_and_a_sharded_state_has_none",
    "specs_of_blocks_are_copied",
]
"""Functions of checks.py."""
