"""Several methods on the same data, with the same number of trained values, side by side.

Run it as it stands: `python examples/compare_methods.py`. It writes to outputs/compare_methods. From a shell, with the
file that it makes: `peftx compare --model folder --task SEQ_CLS --data texts.jsonl --methods lora,allora,flora
--equal budget --seeds 1 --output runs`.
"""

import json
from pathlib import Path

from transformers import AutoTokenizer

from peftx.demo import data
from peftx.demo.model import default_folder
from peftx.train import CompareSettings, compare

MODEL = default_folder()  # all-MiniLM-L6-v2; or a folder or Hub id of yours
OUTPUT = Path("outputs/compare_methods")


def main():
    OUTPUT.mkdir(parents=True, exist_ok=True)
    texts = data.load(AutoTokenizer.from_pretrained(MODEL), limit=400)["train"]
    names = texts.features["label"].names
    records = [{"text": row["text"], "label": names[row["label"]]} for row in texts]
    file = OUTPUT / "texts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))

    settings = CompareSettings(
        model=str(MODEL),
        data=str(file),
        output=str(OUTPUT / "runs"),
        task="SEQ_CLS",  # the folder holds an encoder without a head
        methods=["lora", "allora", "flora"],  # of peftx or PEFT; {"lora": {"lora_alpha": 16}, ...} for settings
        equal="budget",  # of the first method
        rank=8,
        seeds=1,
        eval_share=0.25,
        max_length=48,
        training={"num_train_epochs": 1, "per_device_train_batch_size": 4, "disable_tqdm": True},
    )
    outcome = compare(settings, watch=lambda method, run, runs: print(f"[{run}/{runs}] {method}", flush=True))
    print((OUTPUT / "runs" / "results.md").read_text())
    print(f"Written: {', '.join(map(str, outcome.paths))}")


if __name__ == "__main__":  # each run is a process of its own, which imports this file
    main()
