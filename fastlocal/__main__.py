"""``python -m fastlocal``: the command line, found by name as an installed script would be, for ``torchrun -m fastlocal``."""

import importlib.metadata
import sys

if __name__ == "__main__":
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="fastlocal")
    sys.exit(script.load()())
