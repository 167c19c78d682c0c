"""What a run starts from: timm's pretrained weights, or a file of the user's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from fastlocal.train import loop
from fastlocal.train.build import build_model
from fastlocal.train.config import TrainConfig
from fastlocal.train.start import fitted, read_start

Options = Callable[..., dict[str, Any]]
Command = Callable[..., Any]


@pytest.fixture
def weights(tmp_path: Path, tiny: Options, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights of the tiny model for 1000 classes, where timm looks for pretrained ones in place of its hub."""
    torch.manual_seed(7)
    path, create = tmp_path / "weights.safetensors", timm.create_model

    def from_file(*arguments: Any, **options: Any) -> torch.nn.Module:
        return create(*arguments, **options, pretrained_cfg_overlay={"file": str(path)})

    monkeypatch.setattr(timm, "create_model", from_file)
    save_file(timm.create_model("vit_tiny_patch16_224", img_size=8, **tiny()["model_kwargs"]).state_dict(), path)
    return path


def test_pretrained_weights_with_a_new_classifier(tiny: Options, weights: Path) -> None:
    model = build_model(TrainConfig.of(**tiny(pretrained=True)), 10, (8, 8), start=True)
    given = load_file(weights)
    assert model.state_dict()["head.weight"].shape[0] == 10
    assert all(torch.equal(v, given[name]) for name, v in model.state_dict().items() if not name.startswith("head."))


def test_a_pretrained_run_keeps_its_normalization_and_resumes_without_the_file(
    tiny: Options, weights: Path, cli: Command
) -> None:
    straight = loop.run(TrainConfig.of(**tiny(pretrained=True, experiment="straight")))
    saved = torch.load(straight.folder / "last.pt", weights_only=True)
    assert saved["preprocessing"]["mean"] == [0.5, 0.5, 0.5]  # the model's own, not the digits'
    half = loop.run(TrainConfig.of(**tiny(pretrained=True, experiment="half", epochs=1)))
    assert torch.load(half.folder / "last.pt", weights_only=True)["config"]["pretrained"]
    weights.unlink()
    assert cli("eval", straight.folder).code == 0
    assert loop.resume(half.folder).epochs == 1


def test_a_run_starts_from_the_weights_of_another(tiny: Options) -> None:
    first = loop.run(TrainConfig.of(**tiny(epochs=1)))
    exported = first.folder / "model.safetensors"
    still = {"lr": 1e-12, "weight_decay": 0.0, "warmup_epochs": 0, "experiment": "second"}
    config = TrainConfig.of(**tiny(initial_checkpoint=str(exported), **still))
    second = loop.run(config)
    for name, value in load_file(second.folder / "model.safetensors").items():
        torch.testing.assert_close(value, load_file(exported)[name], rtol=0, atol=1e-6)


def test_what_cannot_be_started_from_is_told(
    cli: Command, flags: Callable[..., list[str]], tmp_path: Path, weights: Path, runs_code: Callable[[Path], object]
) -> None:
    torch.save({"state_dict": {"x": runs_code(tmp_path / "ran")}}, tmp_path / "code.pth")
    (tmp_path / "notes.txt").write_text("weights")
    (tmp_path / "empty").mkdir()
    for name, reason in (
        ("missing.pth", "is no file"),
        ("code.pth", "is no checkpoint, or holds more than tensors and plain values; none of it was run."),
        ("notes.txt", "is no checkpoint, or holds more"),
        ("empty", "is a folder without config.json"),
    ):
        code, _, err = cli("train", *flags(initial_checkpoint=str(tmp_path / name)))
        assert (code, err.count("\n")) == (2, 1)
        assert f"--initial-checkpoint {tmp_path / name} " in err
        assert reason in err
    code, _, err = cli("train", *flags(initial_checkpoint=str(weights), pretrained=True))
    assert code == 2
    assert "exclude each other" in err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "runs").exists()


def _named(prefix: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in weights.items()}


# As people find them: what is around the weights, and what of it is said to have been taken.
WRAPPED: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "plain": (lambda good, bad: good, "weights.pt"),
    "timm, with an average": (
        lambda good, bad: {"state_dict": bad, "state_dict_ema": good},
        "weights.pt state_dict_ema",
    ),
    "DINO": (
        lambda good, bad: {
            "student": _named("module.backbone.", bad),
            "teacher": _named("backbone.", good),
            "epoch": 3,
        },
        "weights.pt teacher",
    ),
    "DINO, wrapped": (lambda good, bad: {"teacher": _named("module.backbone.", good)}, "weights.pt teacher"),
    "Lightning": (
        lambda good, bad: {"state_dict": _named("model.", good), "hyper_parameters": {"lr": 0.1}},
        "weights.pt state_dict",
    ),
    "compiled, in DDP": (lambda good, bad: {"model": _named("module._orig_mod.", good)}, "weights.pt model"),
    "BEiT, DeiT": (
        lambda good, bad: {"model": bad, "model_ema": good, "optimizer": {"state": {}}},
        "weights.pt model_ema",
    ),
    "encoder": (lambda good, bad: _named("encoder.", good), "weights.pt"),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_weights_are_found_in_their_wrapper(wrapper: str, tmp_path: Path, tiny: Options) -> None:
    good, bad = (build_model(TrainConfig.of(**tiny()), 10, (8, 8)).state_dict() for _ in range(2))
    wrap, taken = WRAPPED[wrapper]
    torch.save(wrap(good, bad), tmp_path / "weights.pt")
    _starts_from(str(tmp_path / "weights.pt"), good, taken, tiny)


def _starts_from(place: str, expected: dict[str, torch.Tensor], taken: str, tiny: Options) -> None:
    config = TrainConfig.of(**tiny(initial_checkpoint=place))
    classes = tuple(map(str, range(10)))
    arguments, sentence = fitted(read_start(place), build_model(config, 10, (8, 8)), classes)
    assert sentence == f"{taken}, with its classifier"
    made = build_model(config, 10, (8, 8), weights=arguments).state_dict()
    assert all(torch.equal(made[name], value) for name, value in expected.items())


def test_a_run_and_its_checkpoints_are_starting_points(tiny: Options) -> None:
    run = loop.run(TrainConfig.of(**tiny(epochs=1, model_ema=True))).folder
    exported = load_file(run / "model.safetensors")
    _starts_from(str(run), exported, "model.safetensors", tiny)
    _starts_from(f"local-dir:{run}", exported, "model.safetensors", tiny)
    _starts_from(str(run / "best.pt"), exported, "best.pt trainer ema", tiny)


def test_weights_on_the_hub_come_with_their_preprocessing(
    tiny: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = loop.run(TrainConfig.of(**tiny(epochs=1, mean="0.1", std="0.2"))).folder
    asked: list[tuple[str, str]] = []

    def download(name: str, file: str, **_: Any) -> str:
        asked.append((name, file))
        return str(run / file)

    monkeypatch.setattr("timm.models._hub.download_from_hf", download)
    monkeypatch.setattr("timm.models._hub._get_safe_alternatives", lambda _: ["model.safetensors"])
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda repo_id, filename, **_: download(repo_id, filename))
    start = read_start("hf-hub:somebody/vit")
    assert start.preprocessing["mean"] == (0.1, 0.1, 0.1)
    assert start.labels == tuple(map(str, range(10)))
    _starts_from("hf-hub:somebody/vit", load_file(run / "model.safetensors"), "hf-hub:somebody/vit", tiny)
    assert {name for name, _ in asked} == {"somebody/vit"}
