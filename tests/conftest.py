"""Triton must run in its interpreter in every test process: it reads this variable when it is first imported.

The ops interpret kernels only where a test asks for ``use_kernels("triton")``; elsewhere a CPU takes the reference.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"
