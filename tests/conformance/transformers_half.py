"""PEFT's tests of transformers models, for every method, on local stand-ins. Minutes a method: not a `test_*.py`."""

from . import cases
from .standins import localise
from .suite import aim, load

decoder, encoder_decoder, features, sequences, tokens = load(
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_seq_classifier",
    "test_token_classification_qa",
)

localise(decoder.PEFT_DECODER_MODELS_TO_TEST)
localise(encoder_decoder.PEFT_ENCODER_DECODER_MODELS_TO_TEST)
localise(features.PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST)
localise(sequences.PEFT_SEQ_CLS_MODELS_TO_TEST)
localise(tokens.PEFT_TOKEN_CLS_MODELS_TO_TEST)  # the same list object holds the models for question answering

globals().update(
    {
        **aim(decoder, ALL_CONFIGS=cases.task_rows("CAUSAL_LM")),
        **aim(encoder_decoder, ALL_CONFIGS=cases.task_rows("SEQ_2_SEQ_LM")),
        **aim(features, ALL_CONFIGS=cases.task_rows("FEATURE_EXTRACTION")),
        **aim(sequences, ALL_CONFIGS=cases.task_rows("SEQ_CLS")),
        **aim(
            tokens,
            TOKEN_CLS_CONFIGS=cases.task_rows("TOKEN_CLS"),
            QA_CONFIGS=cases.task_rows("QUESTION_ANS"),
        ),
    }
)
