"""``python -m fastlocal.profiling kernels ...`` is ``fastlocal bench kernels ...`` without the rest of the command line."""

import sys

from fastlocal.profiling.cli import bench

sys.exit(bench(sys.argv[1:]))
