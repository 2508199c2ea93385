"""From a trained adapter to what others can use: a card with results, a look into the file, and a plain LoRA.

`python examples/publish_adapter.py` trains a TriAdaptLoRA adapter, finishes its card, inspects and exports it, and
loads the export in a process that knows only PEFT. It writes to outputs/publish_adapter.
"""

import subprocess
import sys
import warnings

import torch
import transformers
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import peftx
from peftx.demo import data
from peftx.demo.model import HUB_ID, default_folder

MODEL = default_folder()  # all-MiniLM-L6-v2; or a folder or Hub id of yours
OUTPUT = "outputs/publish_adapter"

# What a server does, or anyone: no peftx here.
STOCK = """
import sys, warnings, torch, transformers
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

transformers.logging.set_verbosity_error()
warnings.simplefilter("ignore", FutureWarning)
base, adapter, labels, batch, logits = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=int(labels))
model = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    torch.save(model(**torch.load(batch)).logits, logits)
assert "peftx" not in sys.modules
"""

transformers.logging.set_verbosity_error()  # else each loading reports that the classifier is new
warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is to go
transformers.set_seed(0)

tokenizer = AutoTokenizer.from_pretrained(MODEL)
dataset = data.load(tokenizer, limit=500)
labels = dataset["train"].features["label"].names
base = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=len(labels))
model = get_peft_model(base, peftx.TriAdaptLoRAConfig(target_r=8, target_modules="all-linear", task_type="SEQ_CLS"))
args = TrainingArguments(OUTPUT, num_train_epochs=1, learning_rate=2e-3, dataloader_pin_memory=False)
trainer = Trainer(
    model,
    args,
    train_dataset=dataset["train"],
    processing_class=tokenizer,
    compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()},
    callbacks=[peftx.TriAdaptCallback()],
)
trainer.train()
accuracy = trainer.predict(dataset["test"]).metrics["test_accuracy"]

# The adapter with its card: `save_pretrained` writes how to load it, method and settings; the results are yours.
model.save_pretrained(f"{OUTPUT}/adapter")
card = peftx.hub.finish_card(
    f"{OUTPUT}/adapter",
    metrics={"accuracy": accuracy},
    dataset="docstrings of Python's standard library",
    split="test",
    base_model=HUB_ID,  # instead of a folder of this machine
    training={"epochs": args.num_train_epochs, "learning rate": args.learning_rate, "texts": len(dataset["train"])},
)
print(f"Card with accuracy {accuracy:.3f}: {card}")
# model.push_to_hub("me/my-adapter"); huggingface_hub.upload_folder(repo_id="me/my-adapter", folder_path=card.parent)

# What is in a file, yours or somebody's: nothing in it is executed.
report = peftx.hub.inspect_adapter(f"{OUTPUT}/adapter")
peftx.hub.heat_map(report, f"{OUTPUT}/norms.png")
problems = "; ".join(report.problems) or "none"
print(f"Inspected: {report.method}, {len(report.modules)} modules, {report.nbytes:,} bytes; problems: {problems}")

# A plain LoRA with equal outputs, for PEFT without peftx, vLLM or llama.cpp.
peftx.export_lora(model, f"{OUTPUT}/plain-lora")
batch = tokenizer(dataset["test"]["text"][:32], truncation=True, max_length=48, padding=True, return_tensors="pt")
torch.save(dict(batch), f"{OUTPUT}/batch.pt")
files = [f"{OUTPUT}/plain-lora", str(len(labels)), f"{OUTPUT}/batch.pt", f"{OUTPUT}/logits.pt"]
subprocess.run([sys.executable, "-c", STOCK, MODEL, *files], check=True)
with torch.no_grad():
    difference = (model.eval()(**batch).logits - torch.load(f"{OUTPUT}/logits.pt")).abs().max()
print(f"As a plain LoRA, in a process without peftx: outputs differ by {difference:.0e}")
