"""One base model, several adapters: train them in turn, serve them in one batch, and get the base back.

Each adapter tells the docstrings of one package of Python's standard library from those of others.
Run it as it stands: `python examples/many_adapters.py`. It writes to outputs/many_adapters.
"""

import random
import warnings

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import peftx
from peftx.demo import data
from peftx.demo.model import default_folder

MODEL = default_folder()  # all-MiniLM-L6-v2; or a folder or Hub id of yours
OUTPUT = "outputs/many_adapters"
ADAPTERS = {  # one method for all, as PEFT has it; rank and targets as you like
    "asyncio": peftx.FloraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"),
    "logging": peftx.FloraConfig(r=16, target_modules=["query", "value"], task_type="SEQ_CLS"),
    "xml": peftx.FloraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"),
}

transformers.logging.set_verbosity_error()  # else each loading reports that the classifier is new
warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is to go
transformers.set_seed(0)

tokenizer = AutoTokenizer.from_pretrained(MODEL)
dataset = data.load(tokenizer, limit=800)
names = dataset["train"].features["label"].names


def load_base():
    return AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2)


def task(part, package):
    """The texts of a package, label 1, and as many others, label 0."""
    own = [row["input_ids"] for row in part if names[row["label"]] == package]
    others = [row["input_ids"] for row in part if names[row["label"]] != package]
    return [{"input_ids": ids, "labels": 1} for ids in own] + [
        {"input_ids": ids, "labels": 0} for ids in random.Random(0).sample(others, len(own))
    ]


first, *rest = ADAPTERS
model = get_peft_model(load_base(), ADAPTERS[first], adapter_name=first)
for name in rest:
    model.add_adapter(name, ADAPTERS[name])
for name in ADAPTERS:
    model.set_adapter(name)  # the one that is trained and answers
    args = TrainingArguments(
        OUTPUT, num_train_epochs=1, per_device_train_batch_size=4, learning_rate=3e-3, dataloader_pin_memory=False
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=task(dataset["train"], name),
        processing_class=tokenizer,
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()},
    )
    trainer.train()
    metrics = trainer.predict(task(dataset["test"], name)).metrics
    print(f"{name}: test accuracy {metrics['test_accuracy']:.3f}, half of the texts are of {name}")
model.save_pretrained(OUTPUT)  # a folder for each adapter

# Requests for all of them in one batch, each row with its own adapter.
model.eval()
texts = dataset["test"]["text"][-12:]
batch = tokenizer(texts, truncation=True, max_length=48, padding=True, return_tensors="pt")
order = list(ADAPTERS) * 4
with torch.no_grad():
    mixed = model(**batch, adapter_names=order).logits
    single = {}
    for name in ADAPTERS:
        model.set_adapter(name)
        single[name] = model(**batch).logits
    wanted = torch.stack([single[name][row] for row, name in enumerate(order)])
print(f"A batch for {len(ADAPTERS)} adapters: differs by {(mixed - wanted).abs().max():.0e} from one batch for each")

# Beside LoRA adapters they go as plain LoRAs.
for name in ADAPTERS:
    peftx.export_lora(model, f"{OUTPUT}/lora/{name}", adapter_name=name)
lora = PeftModel.from_pretrained(load_base(), f"{OUTPUT}/lora/{first}", adapter_name=first)
for name in rest:
    lora.load_adapter(f"{OUTPUT}/lora/{name}", adapter_name=name)
lora.add_adapter("new", LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"))
with torch.no_grad():
    mixed = lora.eval()(**batch, adapter_names=order).logits
print(f"The same as plain LoRAs, with {', '.join(lora.peft_config)} on one base: {(mixed - wanted).abs().max():.0e}")

model.set_adapter(first)
model.delete_adapter("xml")
print(f"Left after delete_adapter: {', '.join(model.peft_config)}")
with torch.no_grad():
    encoder, fresh = model.unload().eval().base_model, load_base().eval().base_model
    equal = torch.equal(encoder(**batch).last_hidden_state, fresh(**batch).last_hidden_state)
print(f"After unload the encoder is the base model's again: {equal}")
