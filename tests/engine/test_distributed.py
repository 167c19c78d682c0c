"""Several processes train what one would: to rounding where the batch is split, bit for bit where the modules are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine import distributed
from team import Team

from fastlocal import memory
from fastlocal.distributed.data_parallel import share_of
from fastlocal.distributed.module_parallel import assign
from fastlocal.objectives import OBJECTIVES
from fastlocal.planner.devices import Divided
from fastlocal.planner.scaling import ModuleCost, scaling

TRAIN = "engine.distributed:train"
PLAIN = {"drop_path_rate": 0.0}  # processes draw masks of their own
CLIPPED = "parts, clipping and average"
LOCAL = [name for name in OBJECTIVES if name != "end-to-end"]


@pytest.fixture(scope="module")
def two() -> Iterator[Team]:
    with Team(2) as team:
        yield team


@pytest.fixture(scope="module")
def four() -> Iterator[Team]:
    with Team(4) as team:
        yield team


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield name, tree
    elif isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{name}.{key}")


def difference(one: Any, other: Any) -> float:
    """The largest difference of any number, as a share of the largest number of its tensor."""
    ours, theirs = dict(leaves(one)), dict(leaves(other))
    assert ours.keys() == theirs.keys()
    worst = 0.0
    for name, value in ours.items():
        a, b = value.double(), theirs[name].double()
        assert a.shape == b.shape, name
        if a.numel():
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)))
    return worst


DATA_PARALLEL: dict[str, dict[str, Any]] = {
    **{f"{name}": {"objective": name} for name in OBJECTIVES},
    CLIPPED: {"micro_batch": 3, "clip_grad": 0.05, "ema_decay": 0.9},
    "exact with parts and clipping": {"objective": "end-to-end", "micro_batch": 3, "clip_grad": 0.05},
    "exact finish": {"exact": True, "lookahead": 1},
    "look-ahead": {"lookahead": 1, "objective": "image"},
    "states on the host": {"residency": "optimizer"},
    "all on the host": {"residency": "module", "boundaries": "host", "recompute": "block"},
}


@pytest.mark.parametrize(
    ("size", "case"),
    [*((2, case) for case in DATA_PARALLEL), *((4, case) for case in ("image", "end-to-end", CLIPPED))],
)
def test_a_split_batch_trains_as_the_whole_one_does(two: Team, four: Team, size: int, case: str) -> None:
    options = {"family": "swin", "double": True, "opt": "sgd", "size": 9, "model": PLAIN, **DATA_PARALLEL[case]}
    alone = distributed.train(None, **options)
    team = two if size == 2 else four
    first, *others = team.run(TRAIN, {"data": size}, **options)
    assert difference(first["state"], alone["state"]) < 1e-9
    assert first["reduced"] > 0
    for result in (first, *others):
        assert difference(result["loss"], alone["loss"]) < 1e-9
        assert torch.equal(result["correct"], alone["correct"])
        assert difference(result["norm"], alone["norm"]) < 1e-9
        assert torch.equal(result["logits"], first["logits"])  # all ranks have the same weights
    assert all(result["state"] == {} for result in others)


def test_a_shared_position_bias_is_summed_over_processes(two: Team) -> None:
    options = {"family": "beit", "double": True, "opt": "sgd", "size": 8, "modules": 3}
    for objective in ("feature", "end-to-end"):
        alone = distributed.train(None, objective=objective, **options)
        first, _ = two.run(TRAIN, {"data": 2}, objective=objective, **options)
        assert difference(first["state"], alone["state"]) < 1e-9


def test_loss_scaling_is_agreed(two: Team) -> None:
    """fp16 gradients overflow at first; every process skips the same steps and comes to the same scale."""
    options = {"family": "vit", "amp_dtype": torch.float16, "modules": 2, "steps": 4, "size": 4, "loud": True}
    first, second = two.run(TRAIN, {"data": 2}, **options)
    alone = distributed.train(None, **options)
    assert first["skipped"].any()
    assert torch.equal(first["skipped"], second["skipped"])
    assert torch.equal(first["skipped"], alone["skipped"])
    assert first["state"]["scaler"] == alone["state"]["scaler"]
    assert torch.equal(first["logits"], second["logits"])


MODULE_PARALLEL: dict[str, dict[str, Any]] = {
    **{name: {"objective": name} for name in LOCAL},
    CLIPPED: {"micro_batch": 3, "clip_grad": 0.05, "ema_decay": 0.9},
    "one message at a time": {"queue": 1, "objective": "image"},
    "all on the host": {"residency": "module", "boundaries": "host", "recompute": "block"},
}


@pytest.mark.parametrize(
    ("size", "case"), [*((2, case) for case in MODULE_PARALLEL), *((4, case) for case in ("feature", "image", CLIPPED))]
)
def test_split_modules_train_bit_for_bit(two: Team, four: Team, size: int, case: str) -> None:
    options = {"family": "swin", "steps": 20, "modules": 4, "model": {"drop_path_rate": 0.3}, **MODULE_PARALLEL[case]}
    queue = options.pop("queue", 2)
    alone = distributed.train(None, **options)
    results = (two if size == 2 else four).run(TRAIN, {"modules": size}, queue=queue, **options)
    assert difference(results[0]["state"], alone["state"]) == 0
    assert results[0]["state"]["steps"] == alone["state"]["steps"]
    for result in results:
        mine = slice(*result["exits"])
        assert torch.equal(result["loss"][:, mine], alone["loss"][:, mine])
        assert torch.equal(result["logits"], alone["logits"][mine])
    assert sum(result["loss"].count_nonzero() for result in results) == alone["loss"].numel()
    assert [result["own"][0] for result in results[1:]] == [result["own"][1] for result in results[:-1]]


@pytest.mark.parametrize("objective", ["feature", "image"])
def test_both_at_once(four: Team, objective: str) -> None:
    options = {
        "family": "swin",
        "double": True,
        "opt": "sgd",
        "objective": objective,
        "clip_grad": 0.05,
        "model": PLAIN,
    }
    alone = distributed.train(None, **options)
    results = four.run(TRAIN, {"data": 2, "modules": 2}, **options)
    assert difference(results[0]["state"], alone["state"]) < 1e-9
    assert difference(results[1]["loss"] + results[0]["loss"], alone["loss"]) < 1e-9
    assert all(result["state"] == {} for result in results[1:])


def test_nothing_flows_backwards(four: Team) -> None:
    """What is handed to torch.distributed in a step: to the next process only, and as many bytes as a buffer has."""
    results = four.run("engine.distributed:traffic", {"modules": 4}, "swin", objective="image", modules=4)
    header, images, labels = 512, 8 * 3 * 16 * 16, 64
    for rank, sent in enumerate(results):
        if rank == 3:
            assert sent == {}
        else:  # features, images and labels, and 512 bytes that say what is there
            boundary = 8 * (8 >> rank) ** 2 * (8 << rank) * 4
            assert sent == {rank + 1: header + boundary + labels + (images if rank < 2 else 0)}


MESHES = [
    ({"data": 1, "modules": 2}),
    ({"data": 2, "modules": 1}),
    ({"data": 2, "modules": 2}),
    ({"data": 1, "modules": 4}),
]


@pytest.mark.parametrize("objective", ["feature", "image"])
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"{mesh['data']} x {mesh['modules']}")
def test_the_planner_knows_what_is_sent_and_held(two: Team, four: Team, mesh: dict[str, int], objective: str) -> None:
    """Bytes are those that the processes hand over; memory is estimated, never too low, at most a quarter too high."""
    rows, columns = mesh["data"], mesh["modules"]
    larger = {"embed_dim": 64, "depth": 8}
    with memory.dry_run():
        model = distributed.build("vit", **larger)
        divided = Divided(model, 4, objective, 8, amp_dtype=None, device="cpu", kernels="reference")
        (grid,) = [
            g for g in scaling(divided.costs, rows * columns, 1e9) if g.grid == (rows, columns) and g.way != "pipeline"
        ]
        sharing = divided.share(grid, queue=2)
    cuts = {"rank_cuts": list(sharing.rank_cuts)} if columns > 1 else {}
    team = two if rows * columns == 2 else four
    found = team.run("engine.distributed:measured", mesh, "vit", model=larger, objective=objective, modules=4, **cuts)
    ring, most = 2 * (rows - 1) / rows, 0.0
    for rank, real in enumerate(found):
        span, plan = grid.spans[rank % columns], sharing.plans[rank % columns]
        assert real["sent"] == (divided.costs[span.stop - 1].message(rows) if span.stop < 4 else 0)
        assert real["reduced"] == (sum(divided.costs[k].weights for k in span) if rows > 1 else 0)
        assert real["peak"] <= plan.peak < 1.25 * real["peak"]
        most = max(most, real["sent"] + ring * real["reduced"])
    assert grid.bytes_sent == most


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"{mesh['data']} x {mesh['modules']}")
def test_the_planner_knows_how_long_a_step_takes(two: Team, four: Team, mesh: dict[str, int]) -> None:
    """Modules that sleep take their time on any machine; a step that is not shared as predicted takes twice as long."""
    team = two if mesh["data"] * mesh["modules"] == 2 else four
    pause = 0.2
    cost = ModuleCost(seconds=pause, sent=(8 * 17 * 16 * 4, 0, 64), weights=1e5)
    (predicted,) = [
        one for one in scaling([cost] * 4, team.size, 1e9) if one.grid == tuple(mesh.values()) and one.way != "pipeline"
    ]
    cuts = {"rank_cuts": list(range(4 // mesh["modules"], 4, 4 // mesh["modules"]))} if mesh["modules"] > 1 else {}
    times = []
    for _ in range(3):  # a machine that is busy with other things makes a step longer, never shorter
        found = team.run("engine.distributed:measured", mesh, "vit", pause=pause, steps=4, modules=4, **cuts)
        times.append(max(real["seconds"] for real in found))
        if times[-1] < 1.7 * predicted.seconds:
            break
    assert 0.7 * predicted.seconds < min(times) < 1.7 * predicted.seconds, times


def test_what_is_refused(two: Team) -> None:
    def sentence(shape: dict[str, int], **options: Any) -> str:
        first, second = two.run("engine.distributed:refused", shape, **options)
        assert first == second
        return first

    assert "sends nothing back" in sentence({"modules": 2}, objective="end-to-end")
    assert "use a mesh with 'data' alone" in sentence({"modules": 2}, objective="end-to-end")
    assert "exact=True" in sentence({"modules": 2}, exact=True)
    assert "lookahead must be 0" in sentence({"modules": 2}, lookahead=1)
    assert "share parameters" in sentence({"modules": 2}, family="beit", modules=2)
    assert "1 modules are too few for 2" in sentence({"modules": 2}, modules=1)
    assert "rank_cuts must be 1 increasing numbers from 1 to 3" in sentence({"modules": 2}, rank_cuts=[4])
    assert "queue must be at least 1" in sentence({"modules": 2}, queue=0)
    assert "BatchNorm" in sentence({"data": 2}, family="convnet", modules=2)
    assert "dimensions named 'data' and 'modules'" in sentence({"devices": 2})


def test_different_arguments_are_refused_by_name(two: Team) -> None:
    for name, values in {
        "objective": ("image", "feature"),
        "modules": (2, 3),
        "clip_grad": (1.0, None),
        "decoder": ("mlp", "linear"),
    }.items():
        first, second = two.run("engine.distributed:refused_by_rank", {"data": 2}, [{name: value} for value in values])
        assert first == second
        assert first.startswith(f"{name} is ")
        assert "every process of a run needs the same arguments" in first
    each = [{"size": 8}, {"size": 8, "model": {"img_size": 32}}]
    first, second = two.run("engine.distributed:refused_by_rank", {"data": 2}, each)
    assert "model is" in first


def test_a_batch_that_one_process_refuses_stops_all(two: Team) -> None:
    first, second = two.run("engine.distributed:one_bad_batch", {"data": 2})
    assert "images must be" in second
    assert first == "process 1 along 'data' was given a batch that it refuses."


def test_processes_start_from_the_weights_of_the_first(two: Team) -> None:
    for shape in ({"data": 2}, {"modules": 2}):
        results = two.run("engine.distributed:initial", shape)
        assert difference(results[0], results[1]) == 0


def test_shares_of_a_batch_are_closed_under_reversal() -> None:
    for batch in range(1, 20):
        for size in range(1, 6):
            shares = [share_of(batch, rank, size) for rank in range(size)]
            assert sorted(i for share in shares for i in share) == list(range(batch))
            assert batch < size or all(shares)
            for share in shares if batch >= 2 * size else ():
                assert [batch - 1 - i for i in reversed(share)] == share
            assert max(map(len, shares)) - min(map(len, shares)) <= 3


def test_modules_are_given_out_so_that_none_has_much_to_do() -> None:
    assert assign([1, 1, 1, 1], 2) == [range(2), range(2, 4)]
    assert assign([3, 1, 1, 1], 2) == [range(1), range(1, 4)]
    assert assign([1, 2, 3, 4, 5, 6], 3) == [range(3), range(3, 5), range(5, 6)]
    assert assign([5], 1) == [range(1)]
