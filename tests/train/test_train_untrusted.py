"""Files are not believed: nothing in them is executed, fetched, or taken at its word about its size."""

from __future__ import annotations

import pickle
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from soak import mutations

from fastlocal.train import checkpoint, loop
from fastlocal.train.config import TrainConfig
from fastlocal.train.errors import UserError
from fastlocal.train.options.files import read_file


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, mutations.Target]:
    torch.set_num_threads(1)
    return {target.name: target for target in mutations.targets(tmp_path_factory.mktemp("mutants") / "all")}


@pytest.mark.parametrize(
    ("kind", "count"),
    [("checkpoint, bytes", 100), ("checkpoint, nodes", 60), ("safetensors", 60), ("YAML", 200), ("options", 1000)],
)
def test_mutants_are_read_or_refused(kind: str, count: int, targets: dict[str, mutations.Target]) -> None:
    tally = mutations.try_mutants(targets[kind], count, seed=1)
    assert not tally.examples
    assert tally.outcomes["refused"] > count // 4


def test_a_mutant_that_is_read_is_not_what_the_next_is_held_against(targets: dict[str, mutations.Target]) -> None:
    target = targets["checkpoint, nodes"]
    whole = target.path.parent / "run" / "last.pt"
    tree = torch.load(whole)
    tree["trainer"]["optimizers"][1]["param_groups"][1]["note"] = 1.0
    torch.save(tree, target.path)
    target.read()
    target.path.write_bytes(whole.read_bytes())
    target.read()


def test_mutated_images_are_read_or_refused(targets: dict[str, mutations.Target]) -> None:
    for encoding in mutations.ENCODINGS:
        tally = mutations.try_mutants(targets[f"image, {encoding}"], 100, seed=1)
        assert not tally.examples
        assert tally.outcomes["refused"] > 10


@pytest.mark.parametrize("kind", ["Fashion-MNIST, images-idx3", "Fashion-MNIST, labels-idx1", "WebDataset", "archive"])
def test_mutated_data_sets_are_read_or_refused(kind: str, targets: dict[str, mutations.Target]) -> None:
    tally = mutations.try_mutants(targets[kind], 60, seed=1)
    assert not tally.examples
    assert tally.outcomes["refused"] > 10


@pytest.mark.parametrize("bomb", mutations.BOMBS, ids=lambda text: text[:20].strip())
def test_no_file_of_options_takes_long(bomb: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(bomb)
    begun = time.process_time()
    with pytest.raises(UserError) as told:
        TrainConfig.of(**read_file(tmp_path / "run.yaml"))
    assert time.process_time() - begun < 5
    assert len(str(told.value)) < 1500
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint_path",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "cache_dir",
        "block_fn",
        "device",
        "x\x1b[m",
    ],
)
def test_only_the_shape_of_a_model_can_be_asked_for(name: str) -> None:
    with pytest.raises(UserError, match="is no argument of a model's shape"):
        TrainConfig.of(model_kwargs={name: "http://localhost/x"})


def test_a_checkpoint_has_nothing_fetched(
    tiny: Callable[..., dict[str, Any]], cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = loop.run(TrainConfig.of(**tiny(epochs=1))).folder
    saved = torch.load(run / "last.pt", weights_only=True)
    seen: list[TrainConfig] = []
    monkeypatch.setattr(loop, "build_device", lambda config: seen.append(config) or torch.device("cpu"))
    for changes in ({"download": True}, {"model_kwargs": {"pretrained_cfg": {"url": "http://localhost/x"}}}):
        torch.save({**saved, "config": {**saved["config"], **changes}}, run / "last.pt")
        told = cli("train", "--resume", run)
        assert told.code == (0 if "download" in changes else 2)
        assert cli("eval", run / "last.pt").code == told.code
    assert [config.data.download for config in seen] == [False]


@pytest.mark.parametrize(
    "changes",
    [{"data": "hfds/somebody/images"}, {"model": "hf-hub:somebody/vit"}, {"model": "local-dir:/etc"}],
)
def test_a_checkpoint_has_nothing_opened_that_nobody_asked_for(
    changes: dict[str, str],
    tiny: Callable[..., dict[str, Any]],
    cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Local paths of images are a run's own data: they are read, and named in what is printed."""
    run = loop.run(TrainConfig.of(**tiny(epochs=1))).folder
    saved = torch.load(run / "last.pt", weights_only=True)
    for name in ("best.pt", "last.pt"):
        torch.save({**saved, "config": {**saved["config"], **changes}}, run / name)

    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("opened")

    for place in ("load_model_config_from_hf", "load_model_config_from_path"):
        monkeypatch.setattr(f"timm.models._factory.{place}", opened)
    monkeypatch.setattr("timm.data.create_dataset", opened)
    picture = run / "x.png"
    Image.new("RGB", (8, 8)).save(picture)
    for command in (("train", "--resume", run), ("eval", run), ("eval", run / "last.pt")):
        told = cli(*command)
        assert told.code == 2
        assert next(iter(changes.values())) in told.err
        assert "opened" not in told.err
    assert cli("predict", run, picture).code == (0 if "data" in changes else 2)


def _write_archive(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x/data.pkl", content)
        archive.writestr("x/version", b"3\n")


def _inflating(path: Path) -> None:
    _write_archive(path, b"\x80\x02X\x00\x00\x00\x40" + b"x" * 2**24, zipfile.ZIP_DEFLATED)


def _asking_for_memory(path: Path) -> None:
    _write_archive(path, b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.")


def _repeating(path: Path) -> None:
    nested: list[Any] = [0]
    for _ in range(40):
        nested = [nested, nested]
    _write_archive(path, pickle.dumps({"format": checkpoint.FORMAT, "config": nested}, protocol=2))


def _expanded(path: Path) -> None:
    torch.save({"format": checkpoint.FORMAT, "weights": torch.zeros(1).expand(2**40)}, path)


def _deep(path: Path) -> None:
    nested: Any = 0
    for _ in range(100):
        nested = [nested]
    torch.save({"format": checkpoint.FORMAT, "config": nested}, path)


def _damaged(path: Path) -> None:
    torch.save({"format": checkpoint.FORMAT, "weights": torch.zeros(100)}, path)
    content = path.read_bytes()
    place = content.index(bytes(400))
    path.write_bytes(content[:place] + b"\x3f" + content[place + 1 :])


@pytest.mark.parametrize("write", [_inflating, _asking_for_memory, _repeating, _expanded, _deep, _damaged])
def test_a_checkpoint_is_not_taken_at_its_word(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "x.pt")
    begun = time.process_time()
    with pytest.raises(UserError):
        checkpoint.load(tmp_path / "x.pt")
    assert time.process_time() - begun < 5


def test_every_missing_or_unknown_field_is_named(tmp_path: Path) -> None:
    torch.save({"format": checkpoint.FORMAT, "extra": 1}, tmp_path / "x.pt")
    with pytest.raises(UserError) as told:
        checkpoint.load(tmp_path / "x.pt")
    assert "extra is unknown" in str(told.value) or "and" in str(told.value)
    assert str(told.value).count("is missing") >= 4


def test_numbers_of_any_size_are_judged() -> None:
    for value in (10**400, -(10**5000), float("nan"), float("-inf"), True, [], {}):
        assert checkpoint.finite(value) is False
        assert checkpoint.at_least(0)(value) is False
        assert len(list(checkpoint._problems(value, checkpoint.finite, "lr"))) == 1


def test_a_file_that_cannot_be_opened_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        checkpoint.load(tmp_path)
