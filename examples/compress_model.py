"""A smaller model: linear layers become products of two thin ones, weighted by what the training showed (FWSVD).

`python examples/compress_model.py` fine-tunes an encoder, compresses it, loads it back, and recovers it by a LoRA
on the factors. It writes to outputs/compress_model.
"""

import warnings

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import peftx
from peftx.demo import data
from peftx.demo.model import default_folder

MODEL = default_folder()  # all-MiniLM-L6-v2; or a folder or Hub id of yours
OUTPUT = "outputs/compress_model"

transformers.logging.set_verbosity_error()  # else each loading reports that the classifier is new
warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is to go
transformers.set_seed(0)

tokenizer = AutoTokenizer.from_pretrained(MODEL)
dataset = data.load(tokenizer, limit=500)
labels = dataset["train"].features["label"].names


def trainer_of(model, epochs, callbacks=()):
    args = TrainingArguments(OUTPUT, num_train_epochs=epochs, learning_rate=2e-3, dataloader_pin_memory=False)
    return Trainer(
        model,
        args,
        train_dataset=dataset["train"],
        processing_class=tokenizer,
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()},
        callbacks=list(callbacks),
    )


def accuracy(model):
    return f"test accuracy {trainer_of(model, 0).predict(dataset['test']).metrics['test_accuracy']:.3f}"


base = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=len(labels))
model = get_peft_model(base, peftx.ALLoRAConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"))
fisher = peftx.FisherCallback()  # one vector a layer, from the steps that train anyway
trainer_of(model, 1, [fisher]).train()
print(f"Dense: {accuracy(model)}")

model, report = peftx.compression.compress(model, fisher.statistics, keep=0.6)  # merges the adapter first
print(f"Compressed by {report.summary()}")
print(f"Compressed: {accuracy(model)}")

model.save_pretrained(f"{OUTPUT}/small")
small = AutoModelForSequenceClassification.from_pretrained(f"{OUTPUT}/small")  # needs `import peftx`
batch = tokenizer(dataset["test"]["text"][:32], truncation=True, max_length=48, padding=True, return_tensors="pt")
with torch.no_grad():
    print(f"Loaded: equal outputs, {torch.equal(model.eval()(**batch).logits, small.eval()(**batch).logits)}")

config = LoraConfig(r=8, target_modules=["up", "down"], task_type="SEQ_CLS")  # the factors are linear layers
small = get_peft_model(small, config)
small.print_trainable_parameters()
trainer_of(small, 0.5).train()
print(f"Recovered: {accuracy(small)}")
