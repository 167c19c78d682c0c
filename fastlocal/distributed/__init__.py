"""More than one device: `data_parallel` splits the batch, `module_parallel` the modules; both stand on `ranks`.

All of it is `torch.distributed`; ours is only the order in which things are sent, and each of the two files draws it.
"""

from fastlocal.distributed.data_parallel import Reducer as Reducer
from fastlocal.distributed.module_parallel import Kind as Kind
from fastlocal.distributed.module_parallel import Message as Message
from fastlocal.distributed.module_parallel import Pipeline as Pipeline
from fastlocal.distributed.module_parallel import assign as assign
from fastlocal.distributed.ranks import RankLost as RankLost
from fastlocal.distributed.ranks import Ranks as Ranks
