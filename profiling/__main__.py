"""``python -m fastlocal.profiling ...`` is ``fastlocal bench ...`` without the rest of the command line."""

import sys

from fastlocal.profiling.cli import bench

sys.exit(bench(sys.argv[1:]))
