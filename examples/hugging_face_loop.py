"""A loop like Hugging Face's Trainer: batches are dictionaries, epochs are logged, the model is saved as theirs."""

import torch
from transformers import ViTConfig, ViTForImageClassification

import fastlocal


def main(folder: str | None = None, epochs: int = 2) -> list[float]:
    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_labels=3)
    )
    trainer = fastlocal.LocalTrainer(model, modules=2, objective="end-to-end")  # exact, one module at a time
    batches = [{"pixel_values": torch.randn(8, 3, 32, 32), "labels": torch.randint(0, 3, (8,))} for _ in range(2)]
    log = []
    for _ in range(epochs):
        losses = [trainer.step(batch["pixel_values"], batch["labels"]).loss[-1] for batch in batches]
        log.append(float(torch.stack(losses).mean()))
    if folder is not None:
        model.save_pretrained(folder)
    return log


if __name__ == "__main__":
    print(main())
