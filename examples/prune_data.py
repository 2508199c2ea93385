"""Train on the best part of the data: DONOD scores the samples, and the Trainer gets those that are worth keeping.

A fifth of the labels is made wrong here; watch how much of that is kept. `python examples/prune_data.py` writes the
selection, a table of samples and a picture to outputs/prune_data.
"""

import random
import warnings
from pathlib import Path

import transformers
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import peftx
from peftx.demo import data
from peftx.demo.model import default_folder
from peftx.pruning import score_dataset, select

MODEL = default_folder()  # all-MiniLM-L6-v2; or a folder or Hub id of yours
OUTPUT = Path("outputs/prune_data")

transformers.logging.set_verbosity_error()  # else each loading reports that the classifier is new
warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is to go
transformers.set_seed(0)

tokenizer = AutoTokenizer.from_pretrained(MODEL)
dataset = data.load(tokenizer, limit=400)
train, classes = dataset["train"], len(dataset["train"].features["label"].names)

wrong = set(random.Random(0).sample(range(len(train)), len(train) // 5))
noisy = [(label + 1) % classes if row in wrong else label for row, label in enumerate(train["label"])]
train = train.remove_columns("label").add_column("label", noisy)


def spoilt(rows):
    return f"{len(rows)} samples, {len(wrong.intersection(rows)) / len(rows):.0%} of them with a wrong label"


base = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=classes)
model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"))
args = TrainingArguments(OUTPUT, num_train_epochs=3, learning_rate=2e-3, dataloader_pin_memory=False)

# One argument: nothing else in the code changes.
pruning = peftx.DonodCallback(keep=0.3)
Trainer(model, args, train_dataset=train, processing_class=tokenizer, callbacks=[pruning]).train()
print(f"All:                {spoilt(range(len(train)))}")
print(f"Kept by DONOD:      {spoilt(pruning.selection.indices)}")
print(f"To look at: {', '.join(sorted(str(path) for path in OUTPUT.glob('selection.*')))}")

# Or as functions, for any training loop: scores of the model as it is now, and a choice by one of them.
scores = score_dataset(
    model, train.remove_columns("text"), DataCollatorWithPadding(tokenizer), metrics=("don", "nod", "loss")
)
print(f"Kept by the loss:   {spoilt(select(scores, keep=0.3, method='loss'))}")
clean = train.select(select(scores, keep=0.3, method="donod"))
print(f"A data set of {len(clean)} samples, to train on with anything")
