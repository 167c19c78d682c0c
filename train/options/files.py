"""Files of options, which a person or a run wrote."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from fastlocal.train.errors import UserError, printable, shown

LONGEST_FILE, DEEPEST_FILE = 2**16, 10  # bytes and levels; a file with every option has some 3000 and 3


def read_file(path: str | Path) -> dict[str, Any]:
    """The options in a YAML or JSON file, as `TrainConfig.of` takes them (dashes in names count as underscores).

    Raises:
        UserError: the file is missing, is no YAML, is no mapping, or is not what a person writes: longer than
            `LONGEST_FILE`, nested deeper than `DEEPEST_FILE`, with aliases or with a name given twice.
    """
    import yaml

    try:
        with open(path, "rb") as file:
            content = file.read(LONGEST_FILE + 1)
        if len(content) > LONGEST_FILE:
            raise UserError(f"--config {path} is longer than {LONGEST_FILE} bytes.")
        text = content.decode("utf-8")
        _check_yaml(text, path)  # before anything is built: aliases multiply, and nesting is recursion
        options = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}.") from None
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        # yaml's constructors let through what int, float and datetime raise for texts that only look like theirs
        raise UserError(f"--config {path} is not valid YAML or JSON: {printable(str(error), 300)}.") from None
    if not isinstance(options, dict):
        raise UserError(f"--config {path} must hold a mapping of options to values, got {type(options).__name__}.")
    return {str(name).replace("-", "_"): value for name, value in options.items()}


def _check_yaml(text: str, path: str | Path) -> None:
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"--config {path} must not have aliases, got *{printable(str(event.anchor), 80)}.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST_FILE:
            raise UserError(f"--config {path} must not be nested more than {DEEPEST_FILE} levels deep.")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    names = [str(name.value).replace("-", "_") for name, _ in root.value] if isinstance(root, yaml.MappingNode) else []
    for name, times in Counter(names).items():
        if times > 1:
            raise UserError(f"--config {path} gives {shown(name)} {times} times.")
