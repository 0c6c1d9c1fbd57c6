"""What each key of a published `config.json` may be, whatever the family.

Checked before any other code reads a value. Ranges end far above every published model and far
below what would fill the memory with tables.
"""

from __future__ import annotations

from typing import Any

from lightning_jax.config.kinds import (
    FLAG,
    LARGEST_INDEX,
    OBJECT,
    TEXT,
    Kind,
    choice,
    integer,
    list_of,
    number,
    or_null,
)

Json = dict[str, Any]

SLIDING, FULL = "sliding_attention", "full_attention"

MOST_LAYERS = 1024
_LAYERS = integer(1, MOST_LAYERS)
_LAYER = integer(0, MOST_LAYERS)
_WIDTH = integer(1, 2**20)
_EXPERTS = integer(1, 2**14)
_LENGTH = integer(1)
_BASE = number(1, 1e30, above=True)

KEYS: dict[str, Kind] = {
    "architectures": or_null(list_of(TEXT)),
    "attention_bias": FLAG,
    "clip_qkv": or_null(number()),
    "decoder_sparse_step": _LAYERS,
    "dtype": or_null(TEXT),
    "first_k_dense_replace": _LAYER,
    "head_dim": or_null(_WIDTH),
    "hidden_act": TEXT,
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "layer_types": or_null(list_of(choice((SLIDING, FULL)))),
    "max_position_embeddings": _LENGTH,
    "max_window_layers": or_null(_LAYER),
    "mlp_bias": FLAG,
    "mlp_only_layers": or_null(list_of(_LAYER)),
    "moe_intermediate_size": _WIDTH,
    "n_group": or_null(_EXPERTS),
    "n_routed_experts": or_null(_EXPERTS),
    "n_shared_experts": or_null(integer(0, 2**14)),
    "norm_topk_prob": or_null(FLAG),
    "num_attention_heads": integer(1, 2**16),
    "num_experts": _EXPERTS,
    "num_experts_per_tok": or_null(_EXPERTS),
    "num_hidden_layers": _LAYERS,
    "num_key_value_heads": or_null(integer(1, 2**16)),
    "num_local_experts": or_null(_EXPERTS),
    "original_max_position_embeddings": or_null(_LENGTH),
    "partial_rotary_factor": or_null(number(0, 1, above=True)),
    "quantization_config": or_null(OBJECT),
    "rms_norm_eps": number(1e-30, 1),
    "rope_parameters": or_null(OBJECT),
    "rope_scaling": or_null(OBJECT),
    "rope_theta": or_null(_BASE),
    "routed_scaling_factor": number(0, 1e6, above=True),
    "sliding_window": or_null(_LENGTH),
    "swiglu_alpha": number(),
    "swiglu_limit": number(0, 1e30, above=True),
    "text_config": Kind("left out: only a language model by itself is read", lambda v: v is None),
    "tie_word_embeddings": FLAG,
    "topk_group": or_null(_EXPERTS),
    "torch_dtype": or_null(TEXT),
    "use_sliding_window": FLAG,
    "vocab_size": integer(1, LARGEST_INDEX),
}

# Keys of `rope_scaling`, of `rope_parameters`, and of an entry of it for one kind of layer.
ROPE_KEYS: dict[str, Kind] = {
    "attention_factor": or_null(number(0, 1e6, above=True)),
    "beta_fast": or_null(number(0, 1e9, above=True)),
    "beta_slow": or_null(number(0, 1e9, above=True)),
    "factor": number(1, 1e9),
    "high_freq_factor": number(0, 1e9, above=True),
    "low_freq_factor": number(0, 1e9, above=True),
    "mscale": or_null(number(0, 1e6)),
    "mscale_all_dim": or_null(number(0, 1e6)),
    "original_max_position_embeddings": or_null(_LENGTH),
    "partial_rotary_factor": or_null(number(0, 1, above=True)),
    "rope_theta": or_null(_BASE),
    "rope_type": TEXT,
    "truncate": FLAG,
    "type": TEXT,
    SLIDING: OBJECT,
    FULL: OBJECT,
}
