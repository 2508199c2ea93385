"""The short use, on real text: fine-tune an encoder with FLoRA, save the adapter, load it, merge it.

From which package of Python's standard library does a docstring come? Encoder and texts are part of `peftx[demo]`.
Run it as it stands: `python examples/finetune.py`. It writes to outputs/finetune.
"""

import warnings
from collections import Counter

import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import peftx
from peftx.demo import data
from peftx.demo.model import default_folder

MODEL = default_folder()  # all-MiniLM-L6-v2; or a folder or Hub id of yours
OUTPUT = "outputs/finetune"

transformers.logging.set_verbosity_error()  # else each loading reports that the classifier is new
warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is to go
transformers.set_seed(0)

tokenizer = AutoTokenizer.from_pretrained(MODEL)
dataset = data.load(tokenizer, limit=600)  # a DatasetDict of train and test; or yours, with input_ids and label
labels = dataset["train"].features["label"].names


def load_base():
    return AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=len(labels))


def accuracy(prediction):
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


model = get_peft_model(load_base(), peftx.FloraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"))
model.print_trainable_parameters()

args = TrainingArguments(
    OUTPUT, num_train_epochs=1, per_device_train_batch_size=4, learning_rate=2e-3, dataloader_pin_memory=False
)
trainer = Trainer(model, args, train_dataset=dataset["train"], processing_class=tokenizer, compute_metrics=accuracy)
before = trainer.predict(dataset["test"])
trainer.train()
after = trainer.predict(dataset["test"])
model.save_pretrained(f"{OUTPUT}/adapter")

majority = max(Counter(dataset["test"]["label"]).values()) / len(dataset["test"])
print(f"Test accuracy: {before.metrics['test_accuracy']:.3f} before, {after.metrics['test_accuracy']:.3f} after")
print(f"The largest of {len(labels)} classes has {majority:.3f} of the test texts")

loaded = PeftModel.from_pretrained(load_base(), f"{OUTPUT}/adapter").eval()
merged = PeftModel.from_pretrained(load_base(), f"{OUTPUT}/adapter").merge_and_unload().eval()
batch = tokenizer(dataset["test"]["text"][:32], truncation=True, max_length=48, padding=True, return_tensors="pt")
with torch.no_grad():
    trained, again, plain = (each.eval()(**batch).logits for each in (model, loaded, merged))
print(f"Loaded from {OUTPUT}/adapter: equal outputs, {torch.equal(trained, again)}")
print(f"Merged into a plain {type(merged).__name__}: outputs differ by {(trained - plain).abs().max():.0e}")
