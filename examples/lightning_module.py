"""LocalTrainer inside Lightning: manual optimization, and a checkpoint that is whole."""

import lightning
import timm
import torch

import fastlocal


class Local(lightning.LightningModule):
    def __init__(self, name: str = "test_vit", classes: int = 10) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = timm.create_model(name, num_classes=classes)
        self.trainer_of_modules: fastlocal.LocalTrainer | None = None
        self._saved = None

    def on_fit_start(self) -> None:  # the model is on its device now
        self.trainer_of_modules = fastlocal.LocalTrainer(self.model, modules=3)
        if self._saved is not None:
            self.trainer_of_modules.load_state_dict(self._saved)

    def training_step(self, batch, index):
        metrics = self.trainer_of_modules.step(*batch)
        self.log("loss", metrics.loss[-1], prog_bar=True)

    def configure_optimizers(self):
        return None  # each module has its own

    def on_save_checkpoint(self, checkpoint) -> None:
        checkpoint["fastlocal"] = self.trainer_of_modules.state_dict()

    def on_load_checkpoint(self, checkpoint) -> None:
        self._saved = checkpoint["fastlocal"]


def main(folder: str = ".", steps: int = 2) -> str:
    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 160, 160), torch.randint(0, 10, (8,)))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    options = {"accelerator": "cpu", "default_root_dir": folder, "limit_train_batches": steps, "logger": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(max_epochs=1, **options, **quiet)
    trainer.fit(Local(), loader)
    path = f"{folder}/local.ckpt"
    trainer.save_checkpoint(path)
    again = Local()
    lightning.Trainer(max_epochs=2, **options, **quiet).fit(again, loader, ckpt_path=path, weights_only=False)
    assert again.trainer_of_modules.steps == 2 * steps
    return path


if __name__ == "__main__":
    main()
