"""A method of your own in one file: KronA (arXiv:2212.10650), delta = kron(A, B). It runs as it stands."""

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
        if any(width % config.p for width in site.shape):
            raise ValueError(f"p={config.p} does not divide {site.in_features} and {site.out_features}.")
        shape = [width // config.p for width in site.shape]  # out, in
        self.A = nn.Parameter(torch.randn(config.p, config.p))
        self.B = nn.Parameter(torch.zeros(shape) if config.init_weights else 0.1 * torch.randn(shape))

    def delta_weight(self) -> torch.Tensor:
        return torch.kron(self.A, self.B)

    def add_delta(self, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:  # optional: without the dense delta
        A, B, x = self.A.to(x.dtype), self.B.to(x.dtype), x.unflatten(-1, (len(self.A), -1))
        return result + self.scale * torch.einsum("pq,mn,...qn->...pm", A, B, x).flatten(-2).to(result.dtype)


if __name__ == "__main__":
    model = peft.get_peft_model(nn.Sequential(nn.Linear(16, 32)), KronAConfig(target_modules="0", init_weights=False))
    x = torch.randn(8, 16)
    print(f"merged and unmerged differ by {(model(x) - model.merge_and_unload()(x)).abs().max():.1e}")
