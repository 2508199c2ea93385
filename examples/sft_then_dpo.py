"""TRL's SFTTrainer, then its DPOTrainer, on one adapter, whose state after SFT is the reference of DPO.

As it stands (`pip install "peftx[trl]"`, then `python examples/sft_then_dpo.py`) it trains a tiny Llama with random
weights, offline, to complete docstrings of Python's standard library, and then to prefer them to the same words in
disorder. Real ones:

    python examples/sft_then_dpo.py --model HuggingFaceTB/SmolLM2-135M --data answers.jsonl pairs.jsonl

Rows of data have a prompt and an answer (or prompt, chosen and rejected), in a file that `peftx train --data` reads.
It writes to outputs/sft_then_dpo.
"""

import argparse
import random
import warnings

import peft
import tokenizers
import torch
import transformers
from datasets import Dataset
from datasets import logging as datasets_logging
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import peftx
from peftx.data.fields import texts_of
from peftx.data.records import read
from peftx.demo.data import library

OUTPUT = "outputs/sft_then_dpo"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", nargs="+", metavar="FILE", help="default: docstrings that come along with Python")
parser.add_argument("--model", help="a folder or an id of the Hub; default: a tiny Llama with random weights")
parser.add_argument("--rows", type=int, default=800, help="at most so many, a tenth of them held out")
parser.add_argument("--learning-rate", type=float, help="of SFT; default: 5e-3 for the tiny model, else 2e-4")
options = parser.parse_args()

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets_logging.disable_progress_bar()
warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is to go
transformers.set_seed(0)
draw = random.Random(0)


def in_disorder(answer):
    words = answer.split()
    return " ".join(draw.sample(words, len(words)))


def halves(text):
    words = text.split()[:24]
    return " ".join(words[: len(words) // 2]), " " + " ".join(words[len(words) // 2 :])


def row_of(record):
    """A pair of answers: the record's own, or its answer and the same words in disorder."""
    if {"prompt", "chosen", "rejected"} <= record.keys():
        return {name: record[name] for name in ("prompt", "chosen", "rejected")}
    prompt, answer = texts_of(record, None, None)
    if not prompt:
        prompt, answer = halves(answer)
    return {"prompt": prompt, "chosen": answer, "rejected": f" {in_disorder(answer)}"}


if options.data:
    rows = [row_of(record) for source in options.data for record in read(source)]
else:
    texts = [text for family in library().values() for text in family if len(text.split()) >= 12]
    rows = [row_of({"text": text}) for text in texts]
rows = draw.sample(rows, min(options.rows, len(rows)))
held_out, rows = rows[: len(rows) // 10], rows[len(rows) // 10 :]

folder = options.model or f"{OUTPUT}/base"
if not options.model:
    inner = tokenizers.ByteLevelBPETokenizer()
    texts = (f"{row['prompt']}{row['chosen']}" for row in rows)
    inner.train_from_iterator(texts, vocab_size=1024, special_tokens=["<pad>", "<eos>"], show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def base_model():
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

# What a random model has to learn besides: its embeddings and its head.
adapter = peftx.BoneConfig(
    r=32,
    target_modules="all-linear",
    modules_to_save=None if options.model else ["embed_tokens", "lm_head"],
    task_type="CAUSAL_LM",
)
common = dict(num_train_epochs=1, logging_steps=1, report_to="none", save_strategy="no", max_length=128)
common |= dict(bf16=torch.cuda.is_available(), gradient_checkpointing=bool(options.model), disable_tqdm=True)
common |= dict(per_device_train_batch_size=8, per_device_eval_batch_size=16, dataloader_pin_memory=False)


def answers(some):
    return Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in some])


def preferred(model):
    """The share of held-out pairs of which the chosen answer is the likelier one, token for token."""
    model.eval()
    won = 0
    for row in held_out:
        losses = []
        for answer in (row["chosen"], row["rejected"]):
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = torch.tensor([tokenizer(row["prompt"] + answer)["input_ids"]])[:, :128].to(model.device)
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            with torch.no_grad():
                losses.append(float(model(input_ids=ids, labels=labels).loss))
        won += losses[0] < losses[1]
    return won / len(held_out)


rate = options.learning_rate or (2e-4 if options.model else 5e-3)
sft = SFTTrainer(
    base_model(),
    SFTConfig(f"{OUTPUT}/sft", learning_rate=rate, **common),
    train_dataset=answers(rows),
    eval_dataset=answers(held_out),
    processing_class=tokenizer,
    peft_config=adapter,
)
sft.remove_callback(transformers.trainer_callback.PrinterCallback)
before = sft.evaluate()["eval_loss"]
sft.train()
print(f"SFT: held-out loss {before:.3f} before, {sft.evaluate()['eval_loss']:.3f} after {sft.state.global_step} steps")
print(f"SFT: the chosen one of {len(held_out)} held-out pairs is likelier in {preferred(sft.model):.3f}")
sft.save_model()

# The trained adapter is the policy, and a frozen copy of it the reference: no second model is loaded. The callback
# scores the pairs by their chosen answers and leaves out a fifth of them (see outputs/sft_then_dpo/dpo/selection.md).
dpo = DPOTrainer(
    sft.model,
    args=DPOConfig(f"{OUTPUT}/dpo", learning_rate=rate / 5, beta=0.2, **common),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    callbacks=[peftx.DonodCallback(keep=0.8, overwrite=True)],
)
dpo.remove_callback(transformers.trainer_callback.PrinterCallback)
dpo.train()
losses = [entry["loss"] for entry in dpo.state.log_history if "loss" in entry]
last = sum(losses[-10:]) / len(losses[-10:])
print(f"DPO: loss {losses[0]:.4f} at the first step (ln 2: policy = reference), {last:.4f} over the last ten")
print(f"DPO: the chosen one of {len(held_out)} held-out pairs is likelier in {preferred(dpo.model):.3f}")

# Beside the adapter lies the reference, in a folder `ref`, which nobody needs any more.
dpo.model.delete_adapter("ref")
dpo.save_model()
loaded = peft.PeftModel.from_pretrained(base_model(), f"{OUTPUT}/dpo").eval()
ids = tokenizer(held_out[0]["prompt"], return_tensors="pt")["input_ids"]
with torch.no_grad():
    found, wanted = (each.to("cpu").eval()(input_ids=ids).logits for each in (loaded, dpo.model))
print(f"Saved to {OUTPUT}/dpo. Loaded: equal outputs, {torch.allclose(found, wanted, atol=1e-4)}")
