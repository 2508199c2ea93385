"""What cannot be worked with is refused at the start, by one error that names it."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import tiny_model
from test_compression import statistics_of
from torch import nn

import peftx
from peftx.compression import collect, compress, evaluate, recover

NAN, INF = float("nan"), float("inf")


def data(count: int = 6) -> list[dict[str, torch.Tensor]]:
    rows = torch.randint(1, 64, (count, 5), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in rows]


def pad(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def run_callback(model: Any = None, **options: Any) -> Any:
    return peftx.FisherCallback(**options)


def run_collect(model: Any = None, dataset: Any = None, **options: Any) -> Any:
    return collect(model or tiny_model("llama"), data() if dataset is None else dataset, **{"collator": pad, **options})


def run_compress(model: Any = None, **options: Any) -> Any:
    return compress(model or tiny_model("llama"), **{"keep": 0.6, "method": "svd", **options})


def run_recover(model: Any = None, dataset: Any = None, **options: Any) -> Any:
    collator = options.pop("collator", pad)
    return recover(model or tiny_model("llama"), data() if dataset is None else dataset, collator, **options)


def run_evaluate(model: Any = None, dataset: Any = None, **options: Any) -> Any:
    collator = options.pop("collator", pad)
    return evaluate(model or tiny_model("llama"), data() if dataset is None else dataset, collator, **options)


SEEDS = (-1, 1.5, True, "x", None, NAN, 2**64)
NO_COUNT = (0, -1, 1.5, 2.0, True, NAN, "3", [1])
MODULES = ("([", "", "*a", ["q_proj", 3], [""], 5, b"q_proj", {"q_proj": 1})
PATHS = ("../../x", "/tmp/x", "a/b", "..", ".", "", " ", "a\\b", "c:x", "a\0b", "a\nb", 5, b"x", Path("a"))
TAKEN = ("adapter_model.safetensors", "model.safetensors", "config.json", "README.md", "Training_Args.bin")

CASES: dict[Any, dict[str, tuple]] = {
    run_callback: {
        "estimator": ("guess", None, 3, ["per_batch"]),
        "when": ("now", None, True),
        "what": ((), "hessian", ("fisher", 3), 5, None, b"fisher", [["fisher"]]),
        "directions": NO_COUNT,
        "max_samples": NO_COUNT,
        "every": (*NO_COUNT, None),
        "batch_size": NO_COUNT,
        "seed": SEEDS,
        "output": (*PATHS, *TAKEN),
        "target_modules": MODULES,
        "exclude_modules": MODULES,
    },
    run_collect: {
        "estimator": ("guess", None, ["per_batch"]),
        "what": ((), "hessian", 5, None),
        "directions": NO_COUNT,
        "max_samples": NO_COUNT,
        "batch_size": (*NO_COUNT, None),
        "seed": SEEDS,
        "progress": (1, None, "yes"),
        "collator": (3, "pad"),
        "target_modules": MODULES,
        "exclude_modules": MODULES,
        "model": (None, 3, "bert"),
        "dataset": (3, [], iter([1])),
    },
    run_compress: {
        "keep": (0, 1, -0.5, 1.5, NAN, INF, True, "half", None, [0.5], 10**5000),
        "method": ("tucker", None, 3, ["svd"]),
        "allocation": ("greedy", None, 3),
        "side": ("left", None, 3),
        "alpha": (-1, NAN, INF, "x", None, True, 10**400),
        "randomized": (1, "auto", 0.5),
        "progress": (1, None, "yes"),
        "folder": (5, "", "a\0b", b"x", True),
        "statistics": ("fisher.safetensors", 3, {}),
        "target_modules": MODULES,
        "exclude_modules": MODULES,
    },
    run_recover: {
        "epochs": (0, -1, NAN, INF, True, "1", None, 10**400),
        "learning_rate": (0, -1e-3, NAN, INF, True, "1", None),
        "batch_size": (*NO_COUNT, None),
        "max_steps": (0, -2, 1.5, -1.0, True, NAN, "3", None),
        "seed": (*SEEDS, 2**32),
        "progress": (1, None),
        "collator": (None, 3),
        "dataset": (3, [], iter([1])),
    },
    run_evaluate: {
        "batch_size": (*NO_COUNT, None),
        "progress": (1, None),
        "collator": (None, 3),
        "dataset": (3, [], iter([1])),
    },
}


@pytest.mark.parametrize(
    ("run", "name"),
    [(run, name) for run, names in CASES.items() for name in names],
    ids=lambda part: getattr(part, "__name__", part),
)
def test_every_argument_is_checked(run: Any, name: str) -> None:
    for value in CASES[run][name]:
        said = {"dataset": "data set|dataset|has no length"}.get(name, name)
        with pytest.raises(ValueError, match=said) as caught:
            if name == "model":
                collect(value, data(), pad)
            else:
                run(**{name: value})
        assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_what_is_right_is_taken() -> None:
    callback = peftx.FisherCallback(
        "per_sample", "train", what="abs", directions=np.int64(4), target_modules=r".*_proj", exclude_modules=["k"],
        max_samples=None, every=2, batch_size=None, seed=2**62, output="my sums.safetensors",
    )  # fmt: skip
    assert callback.output == "my sums.safetensors" and peftx.FisherCallback(output=None).output is None
    _, report = run_compress(keep=np.float32(0.5), target_modules=("q_proj",), randomized=True)
    assert len(report.layers) == 2 and report.keep == 0.5


def test_nothing_is_changed_by_a_refusal(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.lm_head.requires_grad_(False)
    with pytest.raises(ValueError, match="epochs must be"):
        recover(model, data(), pad, epochs=NAN)
    assert not model.lm_head.weight.requires_grad
    statistics = statistics_of(model)
    with pytest.raises(ValueError, match=r"target_modules='\(\[' is no regular expression: unterminated"):
        compress(model, statistics, keep=0.5, target_modules="([")


# Models that are not there as a whole


def offloaded(folder: Path, how: str) -> nn.Module:
    import accelerate

    model = tiny_model("llama")
    if how == "cpu":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if how == "disk":
        return accelerate.disk_offload(model, folder / "weights", execution_device="cpu")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"lm_head": "cpu", "model.rotary_emb": "cpu"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder / "weights", force_hooks=True)


def uses(folder: Path) -> dict[str, Any]:
    def train(model: Any) -> None:
        arguments = transformers.TrainingArguments(folder / "out", report_to="none", use_cpu=True, disable_tqdm=True)
        callback = peftx.FisherCallback()
        run = transformers.Trainer(tiny_model("llama"), arguments, pad, data(), callbacks=[callback])
        callback.on_train_begin(run.args, run.state, run.control, model=model)

    return {
        "collect": lambda model: collect(model, data(), pad),
        "compress": lambda model: compress(model, keep=0.6, method="svd"),
        "recover": lambda model: recover(model, data(), pad),
        "evaluate": lambda model: evaluate(model, data(), pad),
        "callback": train,
    }


@pytest.mark.parametrize("how", ["cpu", "disk", "some"])
def test_offloaded_models_are_refused(how: str, tmp_path: Path) -> None:
    model = offloaded(tmp_path, how)
    for name, use in uses(tmp_path).items():
        with pytest.raises(ValueError, match="parts of the model are offloaded.*load it whole"):
            use(model)
            pytest.fail(name)


def test_a_model_on_several_places_without_offloading_works(tmp_path: Path) -> None:
    import accelerate

    model = accelerate.dispatch_model(tiny_model("llama"), {"": "cpu"}, main_device="cpu", force_hooks=True)
    found, wanted = collect(model, data(), pad), collect(tiny_model("llama"), data(), pad)
    for name in wanted:
        assert torch.equal(found[name].fisher_in, wanted[name].fisher_in)
    assert compress(model, found, keep=0.6)[0] is model


def test_split_models_are_refused(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = tiny_model("llama")
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        for use in uses(tmp_path).values():
            with pytest.raises(ValueError, match="split over processes"):
                use(model)
    finally:
        dist.destroy_process_group()


def test_wrapped_and_empty_models_are_refused(tmp_path: Path) -> None:
    for use in uses(tmp_path).values():
        with pytest.raises(ValueError, match=r"wrapped in DataParallel: pass the model inside"):
            use(nn.DataParallel(tiny_model("llama")))
        with torch.device("meta"):
            empty = transformers.LlamaForCausalLM(tiny_model("llama").config)
        with pytest.raises(ValueError, match="has no values"):
            use(empty)
        zero = tiny_model("llama")
        zero.model.norm.weight.ds_id = 3  # of DeepSpeed ZeRO-3
        with pytest.raises(ValueError, match="split over processes"):
            use(zero)
    model = tiny_model("llama")
    before = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    for name, use in uses(tmp_path).items():
        with pytest.raises(ValueError, match="is compiled"):
            use(compiled)
            pytest.fail(name)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize(("kind", "said"), [("fsdp", "FSDP"), ("deepspeed", "DeepSpeed")])
def test_trainings_that_split_the_model_are_refused(kind: str, said: str, tmp_path: Path) -> None:
    class Launched(transformers.Trainer):
        def begin(self, callback: Any) -> None:
            setattr(self, f"is_{kind}_enabled", True)  # as `accelerate launch` has it
            callback.on_train_begin(self.args, self.state, self.control, model=self.model)

    arguments = transformers.TrainingArguments(tmp_path, report_to="none", use_cpu=True, disable_tqdm=True)
    callback = peftx.FisherCallback()
    run = Launched(tiny_model("llama"), arguments, pad, data(), callbacks=[callback])
    with pytest.raises(ValueError, match=rf"does not work under {said}: .*peftx.compression.collect"):
        run.begin(callback)
