"""The command line: ``fastlocal COMMAND``.

Commands are the entry points of the group ``fastlocal.commands``: functions from a list of arguments to an exit code,
so that floors above this one add theirs without being imported here. Their modules import nothing heavy at the top:
``fastlocal --help`` shows the first line of each docstring and answers in a fraction of a second.

Exit codes: 0 done; 2 something that only the user can mend, told in one sentence on stderr; 130 (Ctrl-C) and 143 (any other
signal, lost workers) a training run that was stopped from outside, saved, and can go on with --resume.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import io
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING
from typing import Any, NoReturn

import fastlocal
from fastlocal.train.config import GROUPS, OPTIONS, TrainConfig
from fastlocal.train.errors import StoppedError, UserError, nearest, printable, shown
from fastlocal.train.options.files import read_file
from fastlocal.train.options.values import SEVERAL, checked, flag
from fastlocal.train.recipes import NAMED
from fastlocal.train.signals import INTERRUPTED, end_after_errors, end_at_once
from fastlocal.train.timm_flags import ANSWERS

LONGEST_END = 15  # seconds from an error to the end of a process of several


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fastlocal`` with ``argv``, by default the process's arguments; returns the exit code."""
    # OpenMP's threads spin while they wait for each other. Next to any other busy process that costs far more than it
    # saves (20 times, measured, on two shared cores). OpenMP reads this when torch is imported, so it is set here.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if (
        int(os.environ.get("WORLD_SIZE", "1")) > 1
    ):  # where one process is lost, torch's sockets in the others print stacks
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
        os.environ.setdefault("GLOO_LOG_LEVEL", "FATAL")
    for descriptor in range(3):  # a process started without one would give its number to a file, and print into it
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what it has no character for
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        _give_up_stdout()
        return 0  # the reader has what it wanted, as in `fastlocal --help | head`
    except OSError as error:
        _give_up_stdout()
        return _told(
            f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}.", UserError.exit_code
        )
    except KeyboardInterrupt:
        return _told("interrupted.", INTERRUPTED)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "fastlocal"):
            raise
        return _told(
            f"this needs {package}, which is not installed; install fastlocal with its dependencies (pip without "
            "--no-deps).",
            UserError.exit_code,
        )
    except MemoryError:
        return _told("there is not enough memory.", UserError.exit_code)
    except ValueError as error:
        return _told(str(error), getattr(error, "exit_code", UserError.exit_code))


def _run(arguments: list[str]) -> int:
    commands = {entry.name: entry for entry in importlib.metadata.entry_points(group="fastlocal.commands")}
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_help(commands)
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"fastlocal {fastlocal.__version__}")
        return 0
    name = arguments[0]
    if name not in commands:
        raise UserError(f"there is no command {shown(name)}{nearest(name, commands)}")
    return int(commands[name].load()(arguments[1:]))


def _told(sentence: str, code: int) -> int:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody may be listening
        print(f"error: {printable(sentence)}", file=sys.stderr, flush=True)
    return code


def _give_up_stdout() -> None:
    """Let Python not try, and fail, to write what is left when it ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def train(argv: list[str]) -> int:
    """Train a timm vision transformer one module at a time."""
    parser = training_parser(
        "fastlocal train",
        "Train a timm vision transformer one module at a time; what no flag says, the data's recipe says.",
    )
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    parser.add_argument("--preview", metavar="FILE", help="write augmented training images to FILE.png, and stop")
    parser.add_argument(
        "--recipe", metavar="|".join(NAMED), help="start from these options; flags and --config override them"
    )
    given = options_of(parser, argv)
    recipe = given.pop("recipe", None)
    if recipe is not None:
        given = {**_recipe(recipe, given), **given}
    resumed, preview = given.pop("resume", None), given.pop("preview", None)
    if resumed is not None and preview is not None:
        raise UserError("--preview shows what a run would be given; leave --resume out.")
    config = TrainConfig.of(**given) if resumed is None else None  # a typing error is told before the heavy imports
    if config is not None and (void := config.without_effect(parser.parse(argv))):
        raise UserError(next(iter(void.values())))

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    with end_at_once(), end_after_errors(LONGEST_END) if several else contextlib.nullcontext():
        import torch

        from fastlocal.distributed import RankLost
        from fastlocal.train import loop
        from fastlocal.train.ranks import to_resume
        from fastlocal.train.watch import SAVED

        if config is not None and preview is not None:
            loop.preview(config, preview)
            print(f"preview: {preview}")
            return 0
        if config is not None and (begun := to_resume(config)) is not None:
            resumed, config = begun, None
        try:
            return (loop.resume(resumed, **given) if config is None else loop.run(config)).exit_code
        except torch.OutOfMemoryError as error:
            first = str(error).partition(". ")[0]
            raise UserError(f"{first}: try a smaller --micro-batch, --recompute block or --residency module.") from None
        except RankLost as error:
            raise StoppedError(f"{error} {SAVED}") from None


def _recipe(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options of the recipe ``name`` that ``given`` leaves room for: who says one thing takes back its alternatives."""
    if name not in NAMED:
        raise UserError(f"--recipe {printable(name, 80)} is not one of {', '.join(NAMED)}{nearest(name, NAMED)}")
    if "resume" in given:
        raise UserError("--recipe is for new runs; leave it out with --resume.")
    recipe = NAMED[name]()
    for said, alternatives in (
        ("lr", ("lr_base", "lr_base_size", "lr_base_scale")),
        ("initial_checkpoint", ("pretrained",)),
    ):
        if said in given:
            recipe = {option: value for option, value in recipe.items() if option not in alternatives}
    epochs = checked(OPTIONS["epochs"].field, given.get("epochs", recipe["epochs"]))
    if recipe["warmup_epochs"] > epochs:
        del recipe["warmup_epochs"]  # a tenth, as without a recipe
    return recipe


def evaluate(argv: list[str]) -> int:
    """Measure every exit of a saved run or checkpoint."""
    parser = _Parser(
        prog="fastlocal eval",
        description="Measure every exit of a run (its best checkpoint) or of a checkpoint, by default on its own data.",
    )
    parser.add_argument("run", metavar="RUN_OR_CHECKPOINT", help="a run folder, or a checkpoint such as RUN/last.pt")
    _add_options(
        parser,
        only=("data", "data_dir", "download", "val_limit", "skip_broken", "batch_size", "workers", "device", "kernels"),
    )
    parser.add_argument(
        "--report", metavar="FOLDER", help="write tables per class, the confusion matrix and the surest mistakes there"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse(argv)
    as_json = given.pop("json", False)

    from fastlocal.train.evaluation import evaluate_saved

    result = evaluate_saved(given.pop("run"), **given)
    if as_json:
        print(json.dumps(result))
        return 0
    print(f"{result['checkpoint']} on {result['images']} images of {result['data']}")
    for note in result["notes"]:
        print(note)
    columns = (result[name] for name in ("exits", "accuracy", "top5_accuracy", "loss"))
    for name, accuracy, top5, loss in zip(*columns, strict=True):
        print(f"{name:16s} accuracy {100 * accuracy:5.1f} %   top 5 {100 * top5:5.1f} %   loss {loss:.4f}")
    for row in result["per_class"]:
        print(
            f"class {printable(row['name'], 20):20s} {row['images']:6d} images   accuracy {100 * row['accuracy']:5.1f} %"
            f"   precision {100 * row['precision']:5.1f} %"
        )
    return 0


def predict(argv: list[str]) -> int:
    """Label pictures with a trained model."""
    parser = _Parser(prog="fastlocal predict", description="Label pictures with the trained model of a run.")
    parser.add_argument("run", metavar="RUN_OR_CHECKPOINT", help="a run folder, or a checkpoint such as RUN/last.pt")
    parser.add_argument("images", metavar="IMAGE|FOLDER", nargs="+", help="picture files, or folders of them")
    parser.add_argument("--top-k", metavar="K", help="labels per picture; default: 5")
    parser.add_argument(
        "--exit", metavar="auto|NUMBER", help="answer by an early classifier; auto: the first that is sure"
    )
    parser.add_argument("--csv", metavar="FILE", help="write a table, too")
    _add_options(parser, only=("batch_size", "device"))
    given = parser.parse(argv)
    top_k = _count("--top-k", given.get("top_k", "5"))
    exit = given.get("exit")
    chosen = exit if exit in (None, "auto") else _count("--exit", exit)
    batch_size = _count("--batch-size", given.get("batch_size", "32"))

    from fastlocal.train import predict as prediction

    answers = prediction.predict(
        given["run"], given["images"], top_k=top_k, exit=chosen, batch_size=batch_size, device=given.get("device")
    )
    prediction.show(answers, exit is not None, given.get("csv"))
    return 0


def export(argv: list[str]) -> int:
    """Write the trained model of a run for ONNX Runtime or torch.export."""
    parser = _Parser(
        prog="fastlocal export",
        description="Write the trained model of a run, from pixels 0…255 to probabilities. (timm loads the run itself:"
        ' timm.create_model("local-dir:RUN", pretrained=True).)',
    )
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--onnx", metavar="FILE", help="write an ONNX model")
    parser.add_argument("--torch-export", metavar="FILE", help="write a torch.export program")
    given = parser.parse(argv)
    forms = [
        (form, given[form.replace("-", "_")]) for form in ("onnx", "torch-export") if form.replace("-", "_") in given
    ]
    if not forms:
        raise UserError("fastlocal export needs --onnx FILE or --torch-export FILE.")

    from pathlib import Path

    from fastlocal.train.export import export as write

    for form, file in forms:
        write(Path(given["run"]), Path(file), form)
        print(f"{form}: {file}")
    return 0


def _count(flag: str, text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise UserError(f"{flag} must be a whole number of at least 1, got {shown(text)}.")
    return int(text)


def plan(argv: list[str]) -> int:
    """Find the fastest way to train a model within a memory budget."""
    parser = _Parser(
        prog="fastlocal plan",
        description="Find the fastest way to train a model within a memory budget; nothing is trained, no GPU is needed.",
    )
    about_plan = [
        *(
            "model",
            "model_kwargs",
            "img_size",
            "in_chans",
            "batch_size",
            "memory",
            "objective",
            "decoder",
            "first_target",
        ),
        *(
            "reconstruction",
            "normalize_target",
            "lookahead",
            "freeze",
            "train",
            "linear_probe",
            "opt",
            "opt_betas",
            "opt_eps",
        ),
        *(
            "opt_kwargs",
            "amp",
            "amp_dtype",
            "model_ema",
            "kernels",
            "device",
            "reserve",
            "host_memory",
            "mixup",
            "cutmix",
            "queue",
            "epochs",
            "exact_epochs",
            "exact_every",
        ),
    ]
    _add_options(parser, only=about_plan)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--devices", metavar="N", help="say, too, what several such devices would gain")
    parser.add_argument(
        "--bandwidth",
        metavar="RATE",
        help="of the links between them, one way, such as 1GB/s or 10Gbit/s (default: 12GB/s)",
    )
    given = parser.parse(argv)
    as_json = given.pop("json", False)
    devices, bandwidth = given.pop("devices", None), given.pop("bandwidth", None)
    if bandwidth is not None and devices is None:
        raise UserError("--bandwidth is of the links between several devices: give --devices N, too.")
    count = None if devices is None else _count("--devices", devices)
    config = TrainConfig.of(**{"data": "synthetic", "amp": True, **given})

    gc.disable()  # what is imported is no garbage, and looking for some in it takes a tenth of the whole time
    from fastlocal.train.plan import make_plan, show, show_devices

    gc.freeze()  # nor is it later
    gc.enable()
    if count is not None:
        return show_devices(config, count, bandwidth or "12GB/s", as_json)
    return show(make_plan(config, given), config, as_json)


def doctor(argv: list[str]) -> int:
    """Say what was found on this machine, which kernels will run, and why others will not."""
    _Parser(prog="fastlocal doctor", description=doctor.__doc__).parse(argv)

    from fastlocal.train.doctor import findings

    width = shutil.get_terminal_size().columns
    for name, finding in findings():
        print(textwrap.fill(f"{name:18s} {finding}", width, subsequent_indent=" " * 19, break_on_hyphens=False))
    return 0


def training_parser(prog: str, description: str) -> _Parser:
    """A parser of ``--config`` and of a flag for every option of `TrainConfig`."""
    parser = _Parser(prog=prog, description=description)
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file of options; flags override it")
    _add_options(parser)
    return parser


def options_of(parser: _Parser, argv: list[str]) -> dict[str, Any]:
    """What ``argv`` and the file it names give to a `training_parser`; what is not given is absent."""
    given = parser.parse(argv)
    file = given.pop("config", None)
    return given if file is None else {**read_file(file), **given}


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one sentence, with the flag that may have been meant."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False, argument_default=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}.")

    def parse(self, argv: list[str]) -> dict[str, Any]:
        """The given arguments only, by name; what was not given is absent."""
        known, unknown = self.parse_known_args(argv)
        for argument in unknown:
            flag = argument.partition("=")[0]
            if flag in ANSWERS and flag not in self._option_string_actions:
                raise UserError(f"{self.prog} has no flag {flag} as timm's script has: {ANSWERS[flag]}.")
            if flag.startswith("-"):
                raise UserError(f"{self.prog} has no flag {flag}{nearest(flag, self._option_string_actions)}")
        if unknown:
            raise UserError(f"{self.prog} does not take the argument {unknown[0]!r}.")
        return vars(known)


def _add_options(parser: _Parser, only: Sequence[str] | None = None) -> None:
    """A flag for each option of `TrainConfig`. Its text is read by `TrainConfig`, as a file's values are."""
    groups = {}
    for name, (group, option) in OPTIONS.items():
        if only is not None and name not in only:
            continue
        if group not in groups:
            groups[group] = parser.add_argument_group(group, GROUPS[group].__doc__)
        help = option.metadata["help"]
        if not (option.default is None or option.default is False or "default:" in help):
            help += f" (default: {_written(option.default)})".replace("%", "%%")
        if isinstance(option.default, bool):
            groups[group].add_argument(
                flag(name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help
            )
        else:
            several = option.metadata["parse"] in SEVERAL
            form = "NAME=VALUE" if name.endswith("_kwargs") else "VALUE" if several else name.upper()
            metavar = "|".join(option.metadata["choices"]) or form
            groups[group].add_argument(flag(name), nargs="+" if several else None, metavar=metavar, help=help)


def _written(default: Any) -> str:
    """A default as one would type it."""
    if default in (MISSING, "", ()):
        return "none"
    if default is True:
        return "on"
    values = default if isinstance(default, tuple) else (default,)
    return " ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)


def _print_help(commands: dict[str, importlib.metadata.EntryPoint]) -> None:
    print("usage: fastlocal COMMAND [ARGUMENTS]   (fastlocal COMMAND --help for more)\n")
    print("Train vision transformers one module at a time.\n\ncommands:")
    for name, entry in commands.items():
        print(f"  {name:10s} {(entry.load().__doc__ or '').strip().splitlines()[0]}")
    print("\nfastlocal --version prints the version.")
