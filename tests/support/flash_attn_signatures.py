"""The parameters of flash-attn's functions in full, as published, and stand-ins that accept what these accept.

Read from the sources of flash-attn 2.8.3.post2, which has FlashAttention 3.0.0.b1 in its folder hopper/, of the head of
FlashAttention 3, and of flash-attn-4 4.0.0b13 and b36. An installed package has its own, see `installed`.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from farspan.kernels.cuda.packages import FlashAttn2, FlashAttn3, FlashAttn4, Package

PACKAGES: dict[str, type[Package]] = {"flash-attn": FlashAttn2, "flash_attn_3": FlashAttn3, "flash-attn-4": FlashAttn4}
PUBLIC = "flash_attn_varlen_func"
SEQUENCES = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
OF_3 = (
    "page_table{0}, kv_batch_idx{0}, leftpad_k{0}, rotary_cos{0}, rotary_sin{0}, seqlens_rotary{0}, q_descale{0}, "
    "k_descale{0}, v_descale{0}, softmax_scale{0}"
)
PUBLIC_3 = (
    f"q, k, v, {SEQUENCES}, seqused_q=None, seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, "
    "k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, "
    "pack_gqa=None, deterministic=False, sm_margin=0"
)
FORWARD_4 = (
    "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, "
    "max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None, "
    "window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None, "
    "intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None, "
    "block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None"
)
BACKWARD_4 = (
    "q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None, "
    "window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2, "
    "num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2, "
    "AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, "
    "max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, score_mod=None, "
    "score_mod_bwd=None, mask_mod=None, aux_tensors=None"
)
PUBLIC_4 = (
    "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, "
    "seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False, "
    "window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, "
    "score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None"
)
PUBLISHED: dict[str, tuple[str, dict[str, str]]] = {
    "flash-attn 2.8.3.post2": (
        "flash-attn",
        {
            "_flash_attn_varlen_forward": f"q, k, v, {SEQUENCES}, dropout_p, softmax_scale, causal, "
            "window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, "
            "block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False",
            "_flash_attn_varlen_backward": f"dout, q, k, v, out, softmax_lse, dq, dk, dv, {SEQUENCES}, dropout_p, "
            "softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, "
            "rng_state=None, zero_tensors=False",
            PUBLIC: f"q, k, v, {SEQUENCES}, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), "
            "softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None",
        },
    ),
    "flash_attn_3 3.0.0.b1": (
        "flash_attn_3",
        {
            "_flash_attn_forward": "q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, "
            f"seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, {OF_3.format('')}, causal, window_size=(-1, -1), "
            "attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, "
            "pack_gqa=None, sm_margin=0",
            "_flash_attn_backward": "dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, "
            "max_seqlen_q, max_seqlen_k, dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, "
            "deterministic=False, sm_margin=0",
            PUBLIC: PUBLIC_3,
        },
    ),
    "flash_attn_3, head": (
        "flash_attn_3",
        {
            "_flash_attn_forward": "q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, "
            "cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, "
            f"max_seqlen_k=None, {OF_3.format('=None')}, causal=False, window_size_left=-1, window_size_right=-1, "
            "attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, "
            "pack_gqa=None, sm_margin=0",
            "_flash_attn_backward": "dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, "
            "sequed_q=None, sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, "
            "softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0, "
            "deterministic=False, sm_margin=0",
            PUBLIC: f"{PUBLIC_3}, return_attn_probs=False",
        },
    ),
    "flash-attn-4 4.0.0b13": (
        "flash-attn-4",
        {
            "_flash_attn_fwd": f"{FORWARD_4}, q_descale=None, k_descale=None, v_descale=None, gather_kv_indices=None",
            "_flash_attn_bwd": f"{BACKWARD_4}, block_sparse_tensors=None, dlse=None",
            PUBLIC: f"{PUBLIC_4}, return_lse=False",
        },
    ),
    "flash-attn-4 4.0.0b36": (
        "flash-attn-4",
        {
            "_flash_attn_fwd": f"{FORWARD_4}, aux_scalars=None, q_descale=None, k_descale=None, v_descale=None, "
            "gather_kv_indices=None, scheduler_metadata=None, seqlen_k_per_split=None, "
            "disable_scheduler_metadata=False, gather_bwd_recompute_p=False",
            "_flash_attn_bwd": f"{BACKWARD_4}, aux_scalars=None, block_sparse_tensors=None, dlse=None, "
            "learnable_sink=None",
            PUBLIC: f"{PUBLIC_4}, aux_scalars=None, return_lse=False, scheduler_metadata=None, "
            "seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False, "
            "gather_bwd_token_chunk=None",
        },
    ),
}
"""By version: the package, and the parameters of each function that we call."""
Calls = list[tuple[str, dict[str, Any]]]


def signatures(version: str) -> dict[str, inspect.Signature]:
    """Return the published signatures of a version."""
    functions = PUBLISHED[version][1]
    return {name: inspect.signature(eval(f"lambda {parameters}: None")) for name, parameters in functions.items()}


def installed(package: str) -> dict[str, inspect.Signature]:
    """Return the signatures of an installed package; raises ImportError, or what else keeps it from loading."""
    module = importlib.import_module(PACKAGES[package].module)
    functions = {name: getattr(module, name) for name in (*PACKAGES[package].functions, PUBLIC)}
    # A custom operator of torch has the signature (*args, **kwargs), and its function in `_init_fn`.
    return {name: inspect.signature(getattr(function, "_init_fn", function)) for name, function in functions.items()}


def stand_ins(given: Mapping[str, inspect.Signature], results: Mapping[str, Any], calls: Calls) -> SimpleNamespace:
    """Return a module of functions that accept what those of `given` do, note it in `calls` and return `results`."""

    def make(name: str) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, given[name].bind(*args, **kwargs).arguments))
            return results[name]

        function.__signature__ = given[name]  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return SimpleNamespace(**{name: make(name) for name in given})
