"""Little memory: a base model in 4 bits, ALLoRA on top of it, and optimizer states in 8 bits.

Runs on a CPU as on a GPU: `pip install "peftx[bnb,demo]"`, then `python examples/quantized_base.py`.
It writes to outputs/quantized_base.
"""

import warnings

import torch
import transformers
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)

import peftx
from peftx.demo import data
from peftx.demo.model import default_folder

MODEL = default_folder()  # all-MiniLM-L6-v2; or a folder or Hub id of yours
OUTPUT = "outputs/quantized_base"

transformers.logging.set_verbosity_error()  # else each loading reports that the classifier is new
warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is to go
transformers.set_seed(0)

tokenizer = AutoTokenizer.from_pretrained(MODEL)
dataset = data.load(tokenizer, limit=500)
labels = dataset["train"].features["label"].names


def megabytes(model):
    return f"{model.get_memory_footprint() / 1e6:.1f} MB"


dense = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=len(labels))
base = AutoModelForSequenceClassification.from_pretrained(
    MODEL,
    num_labels=len(labels),
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,  # torch.bfloat16 on a GPU
        llm_int8_skip_modules=["classifier"],  # it is new, and trains in full
    ),
)
print(f"Base model: {megabytes(base)} in 4 bits, {megabytes(dense)} in fp32 (embeddings keep their dtype)")


def accuracy(prediction):
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
model = get_peft_model(base, peftx.ALLoRAConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"))
model.print_trainable_parameters()

args = TrainingArguments(OUTPUT, num_train_epochs=1, learning_rate=2e-3, dataloader_pin_memory=False)
trainer = Trainer(
    model,
    args,
    train_dataset=dataset["train"],
    processing_class=tokenizer,
    compute_metrics=accuracy,
    # LoRA's factors are small, and tensors below min_8bit_size elements keep 32 bits.
    **peftx.optim.trainer_kwargs(args, min_8bit_size=0),
)
before = trainer.predict(dataset["test"])
trainer.train()
after = trainer.predict(dataset["test"])
print(f"Optimizer states: {peftx.optim.summarize(trainer.optimizer)}")
print(f"Test accuracy: {before.metrics['test_accuracy']:.3f} before, {after.metrics['test_accuracy']:.3f} after")
