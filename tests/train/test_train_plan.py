"""``fastlocal plan``: what it prints fits a terminal, and its command is complete."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from typing import Any

import pytest
import timm

from fastlocal import memory
from fastlocal.planner import NOMINAL, Candidate, Plan, Search, search
from fastlocal.train import cli
from fastlocal.train.config import OPTIONS, TrainConfig
from fastlocal.train.plan import command, show

MODEL = ["--model", "test_vit", "--batch-size", "8"]


@pytest.fixture(autouse=True)
def _no_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models here are smaller than cuBLAS's workspaces."""
    monkeypatch.setattr(memory, "cublas_workspaces", lambda device: 0)


def planned(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    code = cli.main(["plan", *MODEL, *options])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def config_of(command: str) -> TrainConfig:
    """What ``fastlocal train`` makes of a command as it is printed; no option in it is void, which `train` would refuse."""
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["fastlocal", "train"]
    given = cli.options_of(cli.training_parser("fastlocal train", ""), words[2:])
    config = TrainConfig.of(**given)
    assert config.without_effect(given) == {}
    return config


def test_plain_training_is_recommended_where_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = planned(capsys, "--memory", "4GiB", "--model-ema")
    assert code == 0
    assert "Plain training fits: use it." in out
    assert "planning: " in err
    assert max(map(len, out.splitlines())) <= 80
    config = config_of(out[out.index("fastlocal train") :])
    assert (config.model.name, config.optimization.batch_size) == ("test_vit", 8)
    assert config.optimization.model_ema
    assert config.memory.amp
    assert (config.learning.objective, config.learning.modules, config.memory.micro_batch) == ("end-to-end", 1, 8)


def test_the_command_says_what_the_plan_says(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--memory", "4MiB", "--reserve", "0MiB", "--objective", "feature", "--opt", "lion", "--json"]
    code, out, _ = planned(capsys, *options, "--img-size", "64")
    assert code == 0
    found = json.loads(out)
    config, chosen = config_of(found["command"]), found["chosen"]
    same: dict[str, Any] = {name: config.get(name) for name in chosen if name in OPTIONS}
    assert same == {name: chosen[name] for name in same}
    assert {"objective", "micro_batch", "recompute", "residency", "boundaries", "weights"} <= set(same)
    assert config.learning.modules == tuple(chosen["cuts"])  # one cut is no number of modules
    assert (config.optimization.opt, config.model.img_size) == ("lion", TrainConfig.of(img_size="64").model.img_size)
    assert all(candidate["accuracy"] == "local + exact finish" for candidate in found["candidates"])
    _, out, _ = planned(capsys, *options, "--exact-epochs", "0")
    found = json.loads(out)
    assert all(candidate["accuracy"] == "local" for candidate in found["candidates"])
    assert config_of(found["command"]).exact_share == 0  # which the default is not


def test_the_command_of_every_plan_is_one_that_train_takes() -> None:
    """Whatever is planned for: an option that means nothing in a plan is not in its command."""
    asked = TrainConfig.of(model="test_vit", decoder="mlp", first_target="patch", amp=True, exact_every=4, epochs=10)
    searches = [
        search(timm.create_model("test_vit", num_classes=10), batch_size=8, budget=budget, reserve=0, **more)
        for budget in ("8MiB", "4GiB")
        for more in ({}, {"objective": "feature", "exact_share": 0.25}, {"objective": "end-to-end"})
    ]
    plans = [candidate.plan for found in searches for candidate in (*found.candidates, *found.rivals)]
    assert {plan.residency for plan in plans} == {"all", "optimizer", "module"}
    assert {plan.accuracy for plan in plans} == {"exact", "local", "local + exact finish"}
    assert {1, 2} < {plan.modules for plan in plans}
    for plan in plans:
        config = config_of(command(plan, asked))
        assert (config.memory.residency, config.memory.micro_batch) == (plan.residency, plan.micro_batch)
        assert bool(config.exact_share) == (plan.accuracy == "local + exact finish")


def test_an_exact_finish_is_planned_for_and_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    memory = ["--memory", "64MiB", "--reserve", "0MiB"]
    finish = ["--objective", "feature", "--epochs", "5", "--exact-epochs", "2"]
    code, out, _ = planned(capsys, *memory, *finish)
    assert code == 0
    assert "exact gradients in the last 40% of the steps" in " ".join(out.split())
    config = config_of(out[out.index("fastlocal train") :])
    assert (config.learning.exact_epochs, config.optimization.epochs, config.exact_share) == (2, 5, 0.4)
    assert TrainConfig.of(epochs=10, exact_epochs=5, exact_every=5).exact_share == pytest.approx(0.6)
    _, out, _ = planned(capsys, *memory, "--json")
    assert {way["accuracy"] for way in json.loads(out)["candidates"]} == {"exact", "local + exact finish", "local"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--memory", "4"], "did you mean 4GiB?"),
        ([], "--memory is missing"),
        (["--memory", "4GiB", "--reserve", "much"], "reserve must be a size such as"),
        (["--memory", "4GiB", "--host-memory", "16"], "did you mean 16GiB?"),
    ],
)
def test_a_mistake_gets_a_sentence(options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = planned(capsys, *options)
    assert code == 2
    assert sentence in err
    assert err.count("\n") == 1


def test_a_long_list_of_cuts_is_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    cuts = tuple(range(1, 60))
    long = Plan("feature", cuts, 8, 4, "none", "module", "host", "low", True, 0, 0, 1.0, 0, 0.0)
    found = Search(long, 2**30, (Candidate(long, "chosen"),), (), 0, 0, NOMINAL)
    assert show(found, TrainConfig.of(model="vit_tiny_patch16_224"), as_json=False) == 0
    command = capsys.readouterr().out.split("fastlocal train")[1]
    assert f"--modules {','.join(map(str, cuts))}" in command
    assert "\n" not in command.strip().replace("\\\n", "")  # every line but the last says that it goes on


def test_where_nothing_fits_the_smallest_card_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = planned(capsys, "--memory", "513MiB", "--batch-size", "64")
    assert code == 2
    assert "Nothing fits" in out
    assert "the smallest card that would do has" in " ".join(out.split())


def test_several_devices_are_simulated(cli: Callable[..., Any]) -> None:
    model = ["--model", "vit_tiny_patch16_224", "--batch-size", 8, "--devices", 2]
    told = cli("plan", *model, "--bandwidth", "100GB/s")
    assert told.code == 0
    assert "simulated" in told.out
    assert "exact pipeline" in told.out
    assert "a bubble of (S − 1)/(M + S − 1), 1/9 for S = 2" in told.out
    assert "Choose --parallel" in told.out
    assert "torchrun --nproc-per-node 2 -m fastlocal train" in told.out
    assert all(len(line) <= 80 for line in told.out.splitlines())
    slow = cli("plan", *model, "--bandwidth", "1 Mbit/s").out
    assert "One device is as fast" in slow
    assert "torchrun" not in slow
    assert "--bandwidth must be a rate" in cli("plan", *model, "--bandwidth", "fast").err
    assert "give --devices N, too" in cli("plan", "--bandwidth", "1GB/s").err


def test_each_of_several_devices_must_fit_the_memory(cli: Callable[..., Any]) -> None:
    model = ["--model", "vit_tiny_patch16_224", "--batch-size", 64, "--devices", 4, "--bandwidth", "100MB/s"]
    asked = [*model, "--reserve", 0, "--json"]
    ways = {limit: json.loads(cli("plan", *asked, "--memory", limit).out) for limit in ("1GiB", "80MiB")}
    for limit, size in (("1GiB", 2**30), ("80MiB", 80 * 2**20)):
        local = [way for way in ways[limit]["ways"] if way["memory"]]
        assert all(way["fits"] == (max(way["memory"]) <= size) for way in local)
        assert {tuple(way["grid"]) for way in local} == {(1, 4), (2, 2), (4, 1), (1, 1)}
        assert all(len(way["memory"]) == way["grid"][1] for way in local)
        best = next(way for way in local if way["fits"])
        assert max(best["memory"]) <= size
    generous, tight = ({tuple(way["grid"]): way for way in ways[limit]["ways"] if way["memory"]} for limit in ways)
    assert max(generous[1, 4]["memory"]) < generous[1, 1]["memory"][0]
    assert tight[1, 4]["speed_up"] < generous[1, 4]["speed_up"]  # smaller parts, recomputation: said, not hidden
    more = json.loads(cli("plan", *asked, "--memory", "1GiB", "--queue", 4).out)["ways"]
    (waiting,) = [way for way in more if way["grid"] == [1, 4] and way["memory"]]
    assert max(waiting["memory"]) > max(generous[1, 4]["memory"])

    nothing = cli("plan", *model, "--memory", "513MiB")
    assert nothing.code == 2
    assert "Nothing fits 513 MiB less 512 MiB of reserve on 4 devices" in " ".join(nothing.out.split())
    assert " over" in nothing.out
    assert "torchrun" not in nothing.out


def test_exact_gradients_are_shared_by_data_alone(cli: Callable[..., Any]) -> None:
    model = ["--model", "vit_tiny_patch16_224", "--batch-size", 8, "--devices", 2, "--objective", "end-to-end"]
    told = cli("plan", *model, "--bandwidth", "100GB/s")
    assert "Choose --parallel data" in told.out
    assert "--objective end-to-end" in told.out
    assert "modules, " not in told.out
    assert "Left out: exact gradients go backwards from module to module." in told.out
    assert "1 images are too few for 2 devices" in cli("plan", *model, "--batch-size", 1).err


def test_the_command_for_several_devices_is_one_that_train_takes(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ["--model", "vit_base_patch16_224", "--batch-size", 8, "--devices", 4, "--queue", 3, "--memory", "4GiB"]
    command = json.loads(cli("plan", *model, "--bandwidth", "10 Gbit/s", "--json").out)["command"]
    start, _, rest = command.partition("-m ")
    assert start == "torchrun --nproc-per-node 4 "
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = config_of(rest)
    assert (config.devices.parallel, config.devices.data_parallel, config.devices.queue) == ("modules", 1, 3)
    assert config.devices.rank_cuts is not None
    assert len(config.devices.rank_cuts) == 3
