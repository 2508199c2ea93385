"""PEFT's tests of custom models (MLPs, convolutions, embeddings), for every method."""

from . import cases
from .suite import aim, load

(suite,) = load("test_custom_models")

globals().update(
    aim(
        suite,
        TEST_CASES=cases.custom_rows(),
        MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES=cases.pair_rows(),
        MIXED_ADAPTER_TEST_CASES=cases.mixed_rows(),
        ALL_PEFT_CONFIG_CLASSES=cases.config_rows(),
    )
)
