"""What the folder examples/ shows runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import fastlocal

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_new_objective_fits_in_forty_lines_and_brings_classes_together() -> None:
    contrastive = example("supervised_contrastive")
    assert len((EXAMPLES / "supervised_contrastive.py").read_text().splitlines()) <= 40
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **small)
    trainer = fastlocal.LocalTrainer(
        model,
        modules=2,
        objective=contrastive.Contrastive(),
        decoder=contrastive.Projection,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=3e-3),
    )
    images, labels = torch.randn(12, 3, 32, 32), torch.arange(12) % 3
    losses = [float(trainer.step(images, labels).regularizer[0]) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]


def test_a_plain_loop_with_a_loss_and_probes_of_its_own() -> None:
    losses = example("plain_loop").main()
    assert len(losses) == 4
    assert losses[-1] < losses[0]


def test_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    assert Path(example("lightning_module").main(str(tmp_path))).is_file()


def test_a_loop_like_hugging_faces(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    losses = example("hugging_face_loop").main(str(tmp_path))
    assert losses[1] < losses[0]
    assert (tmp_path / "model.safetensors").is_file()


def test_per_token_logits_with_a_head_and_a_loss_of_ones_own() -> None:
    class TokenHead(torch.nn.Module):
        def __init__(self, geometry: Any, classes: int) -> None:
            super().__init__()
            self.geometry, self.classifier = geometry, torch.nn.Linear(geometry.channels, classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.classifier(self.geometry.to_grid(x))

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 2), labels.flatten())

    torch.manual_seed(0)
    stem, blocks = torch.nn.Conv2d(3, 16, 4, 4), [torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(2)]

    class MapHead(torch.nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).permute(0, 2, 3, 1)

    view = fastlocal.Backbone(stem, blocks, MapHead(16, 5, 1), (3, 32, 32), layout="NCHW")
    assert view.logits == (8, 8, 5)
    trainer = fastlocal.LocalTrainer(view, modules=2, head=TokenHead, loss=loss, objective="cross-entropy")
    metrics = trainer.step(torch.randn(2, 3, 32, 32), torch.randint(0, 5, (2, 8, 8)))
    assert torch.isfinite(metrics.loss).all()
    assert metrics.correct.tolist() == [0, 0]
