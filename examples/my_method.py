"""A method of your own in one file: KronA (arXiv:2212.10650), delta = scale * kron(A, B). It runs as it stands.

Saving and loading, several adapters, merging, 4-bit and 8-bit bases, mixed batches, the Trainer: all of that comes
with `peftx.register`."""

from dataclasses import dataclass, field

import peft
import torch
from torch import nn

import peftx


@dataclass
class KronAConfig(peftx.AdapterConfig):
    """A Kronecker product of two small factors."""

    p: int = field(default=4, metadata={"help": "A is p x p; p divides both widths of every target."})


@peftx.register("krona", config=KronAConfig, paper="arXiv:2212.10650", tiny={"p": 2})
class KronA(peftx.Adapter):
    def __init__(self, site: peftx.Site, config: KronAConfig) -> None:
        super().__init__(site, config)
        if site.in_features % config.p or site.out_features % config.p:
            raise ValueError(f"p={config.p} does not divide {site.in_features} and {site.out_features}.")
        shape = site.out_features // config.p, site.in_features // config.p
        self.A = nn.Parameter(torch.randn(config.p, config.p))
        self.B = nn.Parameter(torch.zeros(shape) if config.init_weights else 0.1 * torch.randn(shape))

    def delta_weight(self) -> torch.Tensor:
        return torch.kron(self.A, self.B)


if __name__ == "__main__":
    model = peft.get_peft_model(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4)), KronAConfig(target_modules=["0"]))
    model.print_trainable_parameters()
