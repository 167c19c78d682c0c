"""A loop of one's own: a custom loss, a probe of each module's gradient, and a checkpoint that training continues from."""

import timm
import torch
import torch.nn.functional as F

import fastlocal


def main(steps: int = 4) -> list[float]:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=5)
    trainer = fastlocal.LocalTrainer(
        model, modules=3, loss=F.binary_cross_entropy_with_logits
    )  # several labels an image
    norms: list[tuple[int, float]] = []
    trainer.on_module_end = lambda k, module: norms.append(
        (k, sum(float(p.grad.square().sum()) for p in module.parameters() if p.grad is not None) ** 0.5)
    )
    losses: list[float] = []
    trainer.on_step_end = lambda metrics: losses.append(float(metrics.loss[-1]))
    images, labels = torch.randn(4, 3, 160, 160), torch.randint(0, 2, (4, 5)).float()
    for _ in range(steps):
        trainer.step(images, labels)
    assert [k for k, _ in norms] == [0, 1, 2] * steps

    again = fastlocal.LocalTrainer(timm.create_model("test_vit", num_classes=5), modules=3, loss=trainer.loss)
    again.load_state_dict(trainer.state_dict())
    assert torch.equal(again.predict(images), trainer.predict(images))
    return losses


if __name__ == "__main__":
    print(main())
