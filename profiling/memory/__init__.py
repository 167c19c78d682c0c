"""The memory, the bus traffic and the compute of a training step, ours and the rivals', with no GPU.

`setups` says what is compared, `methods` how the rivals train, `step` measures one step of any, `table` is the command
``fastlocal bench memory``, and `plots` draws what it found.
"""

from fastlocal.profiling.memory.setups import CLASSES as CLASSES
from fastlocal.profiling.memory.setups import MIB as MIB
from fastlocal.profiling.memory.setups import Setup as Setup
from fastlocal.profiling.memory.setups import ours as ours
from fastlocal.profiling.memory.setups import rivals as rivals
from fastlocal.profiling.memory.step import batch as batch
from fastlocal.profiling.memory.step import count_flops as count_flops
from fastlocal.profiling.memory.step import local_trainer as local_trainer
from fastlocal.profiling.memory.step import measure as measure
from fastlocal.profiling.memory.step import meter_step as meter_step
from fastlocal.profiling.memory.step import number_of_blocks as number_of_blocks
from fastlocal.profiling.memory.step import possible as possible
from fastlocal.profiling.memory.step import skeleton as skeleton
