"""Modules of fused experts in every layout that transformers has."""

from importlib import import_module
from importlib.util import find_spec

HIDDEN, INNER, E, K = 12, 8, 5, 2  # widths, experts, experts of a token
SIZES = dict(hidden_size=HIDDEN, moe_hidden_size=HIDDEN, intermediate_size=INNER, moe_intermediate_size=INNER)
SIZES |= dict(num_local_experts=E, n_routed_experts=E, moe_num_experts=E, moe_latent_size=None, post_norm_eps=1e-6)
SIZES |= dict(hidden_act="silu", mlp_hidden_act="relu2", swiglu_alpha=1.702, swiglu_limit=7.0)
MODULES = {}  # those that this transformers has
for kind, name in {
    "mixtral": "MixtralExperts",
    "gpt_oss": "GptOssExperts",  # transposed, with bias, with interleaved gate
    "nemotron_h": "NemotronHExperts",  # without gate
    "muse_spark": "MuseSparkExperts",  # with a norm behind
    "aria": "AriaExperts",  # transposed
}.items():
    if find_spec(f"transformers.models.{kind}"):
        cls = getattr(import_module(f"transformers.models.{kind}.modeling_{kind}"), name, None)
        if hasattr(cls, "_apply_gate"):
            MODULES[kind] = cls
