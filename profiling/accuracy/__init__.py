"""``fastlocal bench accuracy``: what ways of training learn, side by side, and what each costs.

``--recipe NAME`` runs a study: the tasks, variants and seeds in the file of that name under ``recipes/``, whose docstring
says what came out, how long it takes and how to repeat it. Without it every objective is trained once, as it is (without an
exact finish), with the flags of ``fastlocal train``. Each run has a folder of its own; a run that was stopped goes on where it
was when the command is given again, and a run that has its row is only read. Rows, tables and plots go to ``accuracy/`` in
the results folder.

Accuracy is that of the last epoch, not of the best one. Images per second are the median over the epochs, of runs one
after another or, with ``--jobs``, side by side: a machine that is busy with other things weighs on some more than on others.
Peaks are what torch allocated on a card for a run, and on a CPU all that its process has held so far, earlier runs included.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastlocal.profiling import results
from fastlocal.profiling.cli import UserError
from fastlocal.train.cli import options_of, training_parser
from fastlocal.train.config import TrainConfig
from fastlocal.train.errors import nearest
from fastlocal.train.options.learning import OBJECTIVES
from fastlocal.train.options.model import ModelOptions


def main(argv: list[str]) -> int:
    """Train what has no row yet; returns the exit code, 130 or 143 if a signal stopped it."""
    from fastlocal.profiling.accuracy import plots, recipe, side_by_side, study, table

    parser = training_parser("fastlocal bench accuracy", __doc__ or "")
    parser.add_argument("--recipe", metavar="NAME", help=f"a study: {', '.join(recipe.names())}")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="those of the recipe (all)")
    parser.add_argument("--variants", nargs="+", metavar="VARIANT", help="those of the recipe (all)")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="(the recipe's)")
    parser.add_argument(
        "--objectives",
        nargs="+",
        choices=OBJECTIVES,
        metavar="OBJECTIVE",
        help="without a recipe: those to train (all)",
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time, each in a process of its own (1)")
    parser.add_argument("--results", default=str(results.RESULTS), help="folder that the rows go to (%(default)s)")
    given = options_of(parser, argv)
    if "model_kwargs" in given:  # flag texts, as yet
        checked = ModelOptions(model_kwargs=given["model_kwargs"])
        given["model_kwargs"] = checked.model_kwargs
        given |= {} if checked.img_size is None else {"img_size": checked.img_size}
    name, folder = given.pop("recipe", None), Path(given.pop("results")) / "accuracy"
    asked = {axis: given.pop(axis, None) for axis in ("tasks", "variants", "objectives")}
    at_once = given.pop("jobs", 1)
    if at_once < 1:
        raise UserError(f"--jobs must be 1 or more, got {at_once}.")
    if "experiment" in given:
        raise UserError("--experiment is set by this command; --output says where run folders are made.")
    if name is None:
        if "objective" in given or asked["variants"] or asked["tasks"]:
            raise UserError("without --recipe, --objectives says what is compared.")
        name, chosen = "objectives", _objectives(given, asked["objectives"] or OBJECTIVES)
    else:
        chosen = recipe.load(name)
        if asked["objectives"]:
            raise UserError("--objectives is for runs without --recipe; with one, --variants says what is compared.")
        if "seed" in given:
            raise UserError("--seed is for runs without --recipe; with one, --seeds says which.")
        if "data" in given:
            chosen = recipe.on(chosen, given["data"])
    tasks = _among("--tasks", asked["tasks"], chosen.tasks)
    variants = _among("--variants", asked["variants"], chosen.variants)
    # All are checked before the first one trains.
    jobs = list(recipe.jobs(name, chosen, given, tasks, variants))
    path, rows, code = folder / f"{name}.jsonl", [], 0
    try:
        if at_once > 1:
            known = results.read_rows(path)
            side_by_side.train([job for job in jobs if study.find(job, known) is None], path, at_once)
        for row in study.run(jobs, path):
            rows.append(row)
            if at_once == 1 or len(rows) == len(jobs):
                results.show(f"\n{table.markdown(chosen, rows)}\n")
    except study.Stopped as stopped:
        code = stopped.exit_code
    finally:
        if path.exists() and name in recipe.names():
            rows = results.read_rows(path)  # the folder shows all there is, not only what was asked for now
            drawn = plots.draw(name, chosen, rows, folder)
            pictures = "".join(f"\n![{file.stem}]({file.name})\n" for file in drawn)
            (folder / f"{name}.md").write_text(f"{table.markdown(chosen, rows)}\n{pictures}")
            print(f"{folder / name}.md: {len(rows)} rows")
    return code


def _objectives(given: dict[str, Any], objectives: list[str] | tuple[str, ...]) -> Any:
    """The recipe that flags alone make."""
    from fastlocal.profiling.accuracy.recipe import Recipe

    data = given.get("data", "digits")
    seed = TrainConfig.of(**{option: value for option, value in given.items() if option != "seeds"}).optimization.seed
    variants = {objective: {"objective": objective} for objective in objectives}
    return Recipe(base={"exact_epochs": 0}, tasks={data: {}}, variants=variants, seeds=(seed,))


def _among(flag: str, asked: list[str] | None, known: Any) -> list[str]:
    for name in asked or []:
        if name not in known:
            raise UserError(f"{flag}: {name!r} is not one of {', '.join(map(repr, known))}{nearest(name, known)}")
    return list(asked or known)
