"""What an installation offers: the public names, and the ops alone where torch and Triton are all there is."""

from __future__ import annotations

import importlib.metadata
import pkgutil
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastlocal

ROOT = Path(__file__).parents[2]
# What `pip install --no-deps` leaves out; None in sys.modules makes an import fail as that of a missing package does.
ABSENT = "import sys; sys.modules.update(dict.fromkeys({absent!r}))\n".format(
    absent=("timm", "torchvision", "einops", "PIL", "safetensors", "yaml", "rich", "matplotlib")
)


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", ABSENT + code], capture_output=True, text=True, timeout=120)


def test_the_ops_need_torch_and_triton_alone() -> None:
    done = run(
        "import torch\n"
        "from fastlocal.kernels import attention, reconstruction_loss, window_attention\n"
        "q = torch.randn(1, 2, 5, 8, requires_grad=True)\n"
        "attention(q, q, q).sum().backward()\n"
        "print(window_attention(torch.randn(1, 8, 8, 48), torch.randn(49, 2), num_heads=2, window_size=4, shift=1).shape)"
    )
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 8, 8, 16])" in done.stdout


@pytest.mark.parametrize(
    ("code", "missing"),
    [
        ("import fastlocal; fastlocal.LocalTrainer", "fastlocal.LocalTrainer needs timm, which is not installed"),
        ("from fastlocal import plan", "fastlocal.plan needs timm, which is not installed"),
        ("from fastlocal.kernels import accelerate; accelerate(None)", "accelerate swaps timm's layers and needs timm"),
    ],
)
def test_what_needs_more_says_so(code: str, missing: str) -> None:
    last = run(code).stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: {missing}")


@pytest.mark.parametrize("command", ["train --data digits", "plan --memory 4GiB", "eval RUN", "bench memory"])
def test_a_command_that_needs_more_says_so_in_a_sentence(command: str) -> None:
    done = run(f"from fastlocal.train.cli import main; sys.exit(main({command.split()!r}))")
    assert done.returncode == 2
    assert re.fullmatch(r"error: this needs \w+, which is not installed; install fastlocal .*\.\n", done.stderr)


def test_doctor_and_help_need_no_more() -> None:
    done = run("from fastlocal.train.cli import main; sys.exit(main(['doctor']) + main(['--help']))")
    assert done.returncode == 0, done.stderr
    assert "window_attention" in done.stdout


def test_help_lists_the_public_names() -> None:
    assert fastlocal.__doc__ is not None
    assert set(fastlocal.__all__) <= set(dir(fastlocal))
    text = pydoc.plain(pydoc.render_doc(fastlocal))
    described = text.partition("PACKAGE CONTENTS")[0]
    for name in {*fastlocal.__all__, "kernels"} - {"__version__"}:
        assert name in described, name
    assert "class LocalTrainer" in text


def test_the_extras_are_what_the_sentences_ask_for() -> None:
    extras = importlib.metadata.metadata("fastlocal").get_all("Provides-Extra") or []
    assert {"plots", "tensorboard", "onnx", "hf", "docs"} <= set(extras)


def test_a_checkout_that_is_not_installed_shows_all_its_packages() -> None:
    """To editors and type checkers, which read imports without importing."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from importlib.util import find_spec\n"
    code += "for name in ('kernels', 'train.data', 'profiling.card'): print(find_spec(f'fastlocal.{name}').origin)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [Path(line).resolve().relative_to(ROOT) for line in done.stdout.splitlines()]
    assert [str(path.parent) for path in found] == ["kernels", "train/data", "profiling/card"]


def test_the_site_has_its_pages_and_documents_what_there_is() -> None:
    pages = re.findall(r"^  - .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(pages) == 7
    assert {page.name for page in (ROOT / "docs").glob("*.md")} == set(pages)
    names = [
        name for page in pages for name in re.findall(r"^::: (\S+)$", (ROOT / "docs" / page).read_text(), re.MULTILINE)
    ]
    assert "fastlocal.LocalTrainer" in names
    for name in names:
        assert pkgutil.resolve_name(name).__doc__, name


def test_every_dependency_is_imported() -> None:
    """A dependency that no file imports is a lie."""
    sources = "\n".join(
        path.read_text() for room in ("fastlocal", "kernels", "train") for path in (ROOT / room).rglob("*.py")
    )
    for requirement in importlib.metadata.requires("fastlocal") or []:
        if "extra ==" in requirement:
            continue
        package = re.split(r"[^\w-]", requirement)[0]
        module = {"pillow": "PIL", "pyyaml": "yaml"}.get(package.lower(), package)
        assert re.search(rf"^\s*(import|from) {module}\b", sources, re.MULTILINE), package
