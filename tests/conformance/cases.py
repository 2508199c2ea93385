"""The rows of PEFT's test matrices: every variant of every registered method, on the layer types it declares."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest

import peftx

ONE_BASE = "the test loads the adapter into another random model, which a method tied to its base weights refuses"

FROZEN = "the test wants every tensor of an adapter trained, FedSVD's A never is; see tests/tuners/test_fedsvd.py"

FLAT = "OPT flattens its tokens before the feed-forward block, where a row is no sample and has no adapter of its own"

# What a method can not do by its nature: {(method or variant, test, "test[layer type]" or "test[model]"): reason}. The
# prefix "lora_" stands for all methods that are LoRA.
SKIP: dict[tuple[str, str], str] = {
    ("loldu", "test_loading_model_requires_grad_set_correctly"): ONE_BASE,
    ("loldu", "test_loading_model_with_modules_to_save_requires_grad_set_correctly"): ONE_BASE,
    ("fedsvd", "test_set_requires_grad"): FROZEN,
    ("fedsvd", "test_loading_model_requires_grad_set_correctly"): FROZEN,
    ("fedsvd", "test_loading_model_with_modules_to_save_requires_grad_set_correctly"): FROZEN,
    **{
        ("fedsvd", f"test_training{kind}_{how}"): FROZEN
        for kind in ("", "_decoders", "_encoder_decoders")
        for how in ("layer_indexing", "gradient_checkpointing")
    },
    ("lora_", "test_weighted_combination_of_adapters"): "the test counts on r=8 and on widths of at least 20; "
    "tests/adapters/test_transformers.py has our own",
    ("compacter", "test_only_params_are_updated"): "the test's three steps of SGD move the modules' own tensors, whose "
    "gradients are a ten-thousandth of the rule's at the published start, by less than its tolerance",
    ("compacter", "test_mixed_adapter_batches[tiny-random-OPTForCausalLM]"): FLAT,
    ("compacter", "test_generate_with_mixed_adapter_batches[tiny-random-OPTForCausalLM]"): FLAT,
    ("triadaptlora", "test_only_params_are_updated"): "the test's three steps of SGD move tensors whose gradients are "
    "of second order in the start's deviation of 0.02 by less than its tolerance",
    ("triadaptlora-zero-core", "test_disable_adapters[Linear]"): "the test's three steps of SGD change the output by "
    "less than its tolerance, since the core starts at zero between factors of 0.02",
    ("flora", "test_only_params_are_updated[Embedding]"): "the test's three steps of SGD behind a saturated softmax "
    "move the factors by 1e-5, less than its tolerance, since their gradient is of second order in the core's",
    ("lora_", "test_only_params_are_updated[Embedding]"): "the test's three steps of SGD behind a saturated softmax "
    "move B by less than its tolerance, since LoRA starts A at zero here; PEFT's own LoRA fails it for 3 of 4 seeds",
}

# Layer type -> (PEFT's model, what the adapter does with it). Linear layers are 10 -> 20 (lin0) and 20 -> 2 (lin1).
ROWS: dict[str, list[tuple[str, dict]]] = {
    "Linear": [
        ("MLP", {"target_modules": "lin0"}),
        ("MLP", {"target_modules": ["lin0"]}),
        ("MLP", {"target_modules": ["lin1"]}),
        ("MLP", {"target_modules": ["lin0", "lin1"]}),
        ("MLP", {"target_modules": r".*\.?lin\d", "exclude_modules": ["lin1"]}),
        ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
        ("MLP2", {"target_modules": ["lin0"]}),
        ("MLP_LayerNorm", {"target_modules": ["lin0", "lin1"]}),
        ("EmbConv1D", {"target_modules": ["lin0"]}),
    ],
    "Conv1D": [
        ("EmbConv1D", {"target_modules": ["conv1d"]}),
        ("EmbConv1D", {"target_modules": ["conv1d", "lin0"]}),
    ],
    "Embedding": [
        ("EmbConv1D", {"target_modules": ["emb"]}),
        ("EmbConv1D", {"target_modules": ["emb", "conv1d"]}),
    ],
    "Conv1d": [
        ("Conv1d", {"target_modules": ["conv1d"]}),
        ("Conv1dBigger", {"target_modules": ["conv1d"]}),
    ],
    "Conv2d": [
        ("Conv2d", {"target_modules": ["conv2d"]}),
        ("Conv2d", {"target_modules": ["conv2d", "lin0"]}),
        ("Conv2d1x1", {"target_modules": ["conv2d"]}),
    ],
    "Conv3d": [
        ("Conv3d", {"target_modules": ["conv3d"]}),
        ("Conv3d", {"target_modules": ["conv3d", "lin0"]}),
    ],
}
NARROW = {"Conv1D", "Embedding", "Conv1d"}  # layers with a side of 1 or 5


class Awake(str):
    """An `init_weights` mode with a name, such as "bat", whose weights shall start as anything but a no-op."""


def awake(config: type, kwargs: dict) -> dict:
    """The kwargs of a config whose adapter is not a no-op. PEFT's helper of this kind turns a named mode into False."""
    field = "init_lora_weights" if hasattr(config, "init_lora_weights") else "init_weights"
    mode = kwargs.get(field, True)
    return {**kwargs, field: Awake(mode) if isinstance(mode, str) else False}


@dataclass(frozen=True)
class Variant:
    """One mode of a method: its name, and the config kwargs that fit PEFT's tiny models."""

    name: str
    method: peftx.MethodInfo
    kwargs: dict

    @property
    def narrow(self) -> dict:
        """The kwargs with every size in the method's `tiny` kwargs at 1, which fits any layer."""
        sizes = (key for key, value in self.method.tiny.items() if type(value) is int)
        return {**self.kwargs, **dict.fromkeys(sizes, 1)}

    def pairs(self) -> list[tuple[str, dict, dict]]:
        """Kwargs of two adapters, neither a no-op, that share PEFT's MLP in different ways."""
        kwargs, narrow = awake(self.method.config, self.kwargs), awake(self.method.config, self.narrow)
        one, other, both = ({"target_modules": targets} for targets in (["lin0"], ["lin1"], ["lin0", "lin1"]))
        return [
            ("same", {**kwargs, **one}, {**kwargs, **one}),
            ("different", {**kwargs, **one}, {**kwargs, **other}),
            ("overlapping", {**kwargs, **one}, {**kwargs, **both}),
            ("ranks", {**kwargs, **one}, {**narrow, **one}),
        ]

    def param(self, *values: object) -> object:
        """A row of a parametrised test that knows its variant."""
        return pytest.param(*values, marks=pytest.mark.conformance(self))


def variants() -> list[Variant]:
    """Of all registered methods, or of those named in CONFORMANCE=bone,loldu."""
    methods = {method.name: method for method in peftx.methods()}
    chosen = [name for name in os.environ.get("CONFORMANCE", "").split(",") if name] or list(methods)
    if unknown := set(chosen) - set(methods):
        raise pytest.UsageError(f"CONFORMANCE names {sorted(unknown)}; the methods are {sorted(methods)}")
    return [
        Variant(mode, method, {**method.tiny, **kwargs})
        for method in map(methods.__getitem__, chosen)
        for mode, kwargs in method.variants.items()
    ]


def skip_reason(variant: Variant, test: str, subject: str = "") -> str | None:
    """Why a variant does not take part in a test of `subject`, a layer type or a model, if it does not."""
    if "merg" in test and not variant.method.mergeable:
        return f"{variant.method.name} is not mergeable"
    names = (variant.name, variant.method.name, variant.method.prefix)
    keys = [(name, key) for name in names for key in (test, f"{test}[{subject}]")]
    return next((SKIP[key] for key in keys if key in SKIP), None)


def custom_rows() -> list:
    """`(test name, model, config class, kwargs)` for PEFT's custom models, on every layer type a method declares."""
    return [
        variant.param(f"{variant.name} {layer} {number}", model, variant.method.config, {**kwargs, **use})
        for variant in variants()
        for layer in variant.method.layer_types
        for number, (model, use) in enumerate(ROWS.get(layer, []), 1)
        for kwargs in [variant.narrow if layer in NARROW else variant.kwargs]
    ]


def pair_rows() -> list:
    """`(test name, method, config class, kwargs, kwargs)`: two adapters, neither a no-op, on PEFT's MLP."""
    return [
        variant.param(f"{variant.name} {name}", variant.method.name, variant.method.config, first, second)
        for variant in variants()
        for name, first, second in variant.pairs()
    ]


def mixed_rows() -> list:
    """`(test name, config, config)`: two adapters, neither a no-op, for the rows of one batch."""
    return [
        variant.param(f"{variant.name} {name}", variant.method.config(**first), variant.method.config(**second))
        for variant in variants()
        if variant.method.mixed_batches
        for name, first, second in variant.pairs()
    ]


def config_rows() -> list:
    """`config class`: these tests pass targets alone, so that each method has one row."""
    return [variant.param(config) for config, variant in {v.method.config: v for v in reversed(variants())}.items()]


def task_rows(task: str) -> list:
    """`(config class, kwargs)` for transformers models; PEFT's or peftx's default target modules."""
    return [
        variant.param(variant.method.config, {"task_type": task, **variant.kwargs, "target_modules": None})
        for variant in variants()
    ]
