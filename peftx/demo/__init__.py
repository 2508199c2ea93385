"""`peftx demo`: LoRA and every method of peftx on a real encoder and a task that every machine has."""
