"""A method of your own in one file: KronA (arXiv:2212.10650), delta = scale * kron(A, B).

Run it as it stands: `python examples/my_method.py`. Saving and loading, several adapters, merging, 4-bit and 8-bit
bases, mixed batches, the Trainer: all of that comes with `peftx.register`.
"""

from dataclasses import dataclass, field

import peft
import torch
from torch import nn

import peftx


@dataclass
class KronAConfig(peftx.AdapterConfig):
    """A Kronecker product of two small factors."""

    p: int = field(default=4, metadata={"help": "A is p x p; p divides both widths of every target."})
    scale: float = field(default=1.0, metadata={"help": "Factor of the delta."})


@peftx.register("krona", config=KronAConfig, paper="arXiv:2212.10650", tiny={"p": 2})
class KronALinear(peftx.AdapterLayer):
    adapter_layer_names = ("krona_A", "krona_B")

    def create(self, adapter_name: str, config: KronAConfig) -> None:
        if self.in_features % config.p or self.out_features % config.p:
            raise ValueError(f"p={config.p} does not divide {self.in_features} and {self.out_features}.")
        B = torch.zeros(self.out_features // config.p, self.in_features // config.p)  # the model starts unchanged
        if not config.init_weights:
            nn.init.normal_(B, std=0.1)
        self.krona_A[adapter_name] = nn.Parameter(torch.randn(config.p, config.p))
        self.krona_B[adapter_name] = nn.Parameter(B)

    def delta_weight(self, adapter_name: str) -> torch.Tensor:
        delta = torch.kron(self.krona_A[adapter_name], self.krona_B[adapter_name])
        return self.adapter_config[adapter_name].scale * delta

    # Optional: the same on an activation, without ever building the dense delta.
    def add_delta(self, adapter_name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        A, B = self.krona_A[adapter_name].to(x.dtype), self.krona_B[adapter_name].to(x.dtype)
        scale = self.scaling[adapter_name] * self.adapter_config[adapter_name].scale
        y = torch.einsum("pq,mn,...qn->...pm", A, B, x.unflatten(-1, (len(A), -1))).flatten(-2)
        return result + (scale * y).to(result.dtype)


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    model = peft.get_peft_model(model, KronAConfig(p=4, target_modules=["0", "2"]))
    model.print_trainable_parameters()
    x, y = torch.randn(64, 16), torch.randint(4, (64,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    error = (model(x) - model.merge_and_unload()(x)).abs().max()
    print(f"loss {loss:.3f}; merged and unmerged differ by {error:.1e}")


if __name__ == "__main__":
    main()
