"""Shared by all tests: offline, the registry with the example method in it, and tiny models built from configs."""

import importlib.util
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, beside pytest-xdist's one a core
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import peft
import pytest
import tokenizers
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import peftx

torch.set_num_threads(1)  # tiny tensors: a second thread only costs

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


my_method = load_example("my_method")  # a method from outside the package is tested like our own


@dataclass(frozen=True)
class Case:
    """One mode of one registered method."""

    name: str
    info: peftx.MethodInfo
    kwargs: dict

    def config(self, **kwargs: Any):
        """A config that fits tiny layers."""
        return self.info.config(**{**self.info.tiny, **self.kwargs, **kwargs})

    @property
    def is_lora(self) -> bool:
        """Whether the method is LoRA with another training rule, and so stands on PEFT's own layers."""
        return issubclass(self.info.config, peft.LoraConfig)

    @property
    def lora_export(self) -> str:
        """What `peftx.export_lora` makes of it: exact, dora, svd or none."""
        return self.info.lora_export_of(self.kwargs)

    @property
    def init_field(self) -> str:
        """The config field that says how an adapter starts."""
        return "init_lora_weights" if self.is_lora else "init_weights"


CASES = [Case(name, info, dict(kwargs)) for info in peftx.methods() for name, kwargs in info.variants.items()]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # PEFT's suite is thousands of tests: not even collected unless somebody asks for it.
    return True if collection_path.name == "conformance" and config.option.markexpr.startswith("not") else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, ids=[case.name for case in CASES])


def tuner_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """The layers that hold adapters, of either family, by their names in the base model."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def starts_as(case: Case, found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether the output `found` of a fresh adapter is the base's: bit for bit, or to what the method declares."""
    tolerance = 0.0 if case.info.exact_start else max(1e-5, torch.finfo(wanted.dtype).eps) * max(1, wanted.abs().max())
    return found.dtype == wanted.dtype and bool((found - wanted).abs().max() <= tolerance)


class MLP(nn.Module):
    """Layer names as in PEFT's own tests."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.lin0 = nn.Linear(12, 16, bias=bias)
        self.lin1 = nn.Linear(16, 8, bias=bias)
        self.head = nn.Linear(8, 4, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.lin1(torch.tanh(self.lin0(x)))))


@pytest.fixture
def mlp() -> MLP:
    torch.manual_seed(0)
    return MLP().eval()


SMALL = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)


def tiny_model(kind: str) -> transformers.PreTrainedModel:
    """A random model of a few thousand parameters: "llama", "bert" (classifier), "gpt2" (Conv1D) or "t5"."""
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0)
        return transformers.LlamaForCausalLM(config).eval()
    if kind == "bert":
        config = transformers.BertConfig(**SMALL, max_position_embeddings=64, num_labels=3)
        return transformers.BertForSequenceClassification(config).eval()
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=64, n_positions=64, pad_token_id=0)
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, vocab_size=64, decoder_start_token_id=0, pad_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def words() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of the words w1 to w62."""
    vocabulary = {"<pad>": 0, **{f"w{i}": i for i in range(1, 63)}, "<eos>": 63}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, 64, (3, 7), generator=torch.Generator().manual_seed(0))


def randomize(model: nn.Module, case: Case, std: float = 0.1, seed: int = 0) -> None:
    """Moves every trainable adapter parameter away from its start, so that the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if case.info.prefix in name and parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.data += noise.to(parameter.dtype)


def adapted(model: nn.Module, case: Case, *names: str, **config: Any) -> peft.PeftModel:
    """`model` in eval mode with adapters (`"default"`) that do something; the last of them is active."""
    names = names or ("default",)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, case.config(**config), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, case.config(**config))
    for seed, name in enumerate(names):
        model.set_adapter(name)
        randomize(model, case, seed=seed)
    return model.eval()


def forward(model: nn.Module, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Logits of a (possibly adapted) `tiny_model`."""
    if model.config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = tokens[:, :3]
    return model(input_ids=tokens, **kwargs).logits


# Without gradients, since PyTorch's attention rounds otherwise where a bias of the base could need one.
logits = torch.no_grad()(forward)


@pytest.fixture(params=[case for case in CASES if case.info.mergeable], ids=lambda case: case.name)
def mergeable(request: pytest.FixtureRequest) -> Case:
    """Like `case`, for the methods that change the weight."""
    return request.param


@pytest.fixture(params=[case for case in CASES if not case.info.mergeable], ids=lambda case: case.name)
def unmergeable(request: pytest.FixtureRequest) -> Case:
    return request.param
