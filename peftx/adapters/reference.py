"""The adapter that TRL's trainers add as a copy of the trained one, and what they leave out of it."""

import torch
from peft.utils import TrainableTokensWrapper
from torch import nn

REFERENCE = "ref"


@torch.no_grad()
def copy_tokens(model: nn.Module, source: str, target: str) -> None:
    """Gives `target` the trained rows of embeddings (`trainable_token_indices`) that `source` has: their parameters are
    called `trainable_tokens_delta.<adapter>`, and TRL copies what has `.<adapter>.` in its name."""
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper):
            rows = module.token_adapter.trainable_tokens_delta
            if source in rows and target in rows:
                rows[target].copy_(rows[source])
