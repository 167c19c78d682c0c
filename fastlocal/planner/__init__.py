"""From a memory budget to a way of training that fits it, in a few seconds and without a GPU.

`profile` measures each distinct block once, `estimate` adds a step's memory, compute and traffic up from that for every
candidate, `search` ranks them, and `rehearsal` runs the real step of the best ones without arithmetic until one is seen to fit.
`cards` says how fast a card is, `budget` what of its memory is to be had.
"""

from fastlocal.planner.budget import RESERVE as RESERVE
from fastlocal.planner.budget import format_bytes as format_bytes
from fastlocal.planner.budget import parse_bytes as parse_bytes
from fastlocal.planner.cards import CARDS as CARDS
from fastlocal.planner.cards import NOMINAL as NOMINAL
from fastlocal.planner.cards import Card as Card
from fastlocal.planner.estimate import Plan as Plan
from fastlocal.planner.search import Candidate as Candidate
from fastlocal.planner.search import DoesNotFit as DoesNotFit
from fastlocal.planner.search import Search as Search
from fastlocal.planner.search import plan as plan
from fastlocal.planner.search import search as search
from fastlocal.planner.search import state_share as state_share
