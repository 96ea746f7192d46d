"""The Python API: prune, recover, evaluate, measure and export models that are in memory already.

    import kvp

    model, tokenizer = kvp.load("smollm2_135m")
    pruned = kvp.prune(model, tokenizer, "kvpruner", ratio=0.25)
    pruned.save("pruned", tokenizer)

It runs the code that the command runs, without a configuration file, and without a store unless one is given. Bad input
gets the same messages. `kvp.__all__` is the API; everything else of kvp may change.
"""

from kvp.api.examining import Evaluation, evaluate, measure
from kvp.api.files import export, load
from kvp.api.listing import methods
from kvp.api.pruning import Pruned, prune
from kvp.api.recovering import Recovered, recover
from kvp.strategies.allocation.allocate import Global, Sensitivity, Uniform
from kvp.strategies.allocation.tied import Tied
from kvp.strategies.compensation.compensate import Bias, LeastSquares
from kvp.strategies.compensation.sequential import Sequential
from kvp.strategies.methods.adapruner import AdaPruner
from kvp.strategies.methods.alps import ALPS
from kvp.strategies.methods.care import CARE
from kvp.strategies.methods.chain import Chain
from kvp.strategies.methods.clover import CLOVER
from kvp.strategies.methods.flap import FLAP
from kvp.strategies.methods.kvpruner import KVPruner
from kvp.strategies.methods.kvpruner_plus import KVPrunerPlus
from kvp.strategies.methods.kvpruner_plus_mla import KVPrunerPlusMLA
from kvp.strategies.methods.llm_bip import LLMBIP
from kvp.strategies.methods.llm_pruner import LLMPruner
from kvp.strategies.methods.magnitude import Magnitude
from kvp.strategies.methods.magnitude_sparse import MagnitudeSparse
from kvp.strategies.methods.mha2mla import MHA2MLA
from kvp.strategies.methods.mosaic import Mosaic
from kvp.strategies.methods.nirvana import NIRVANA
from kvp.strategies.methods.none import NoPruning
from kvp.strategies.methods.numerical import Numerical
from kvp.strategies.methods.olica import Olica
from kvp.strategies.methods.palu import Palu
from kvp.strategies.methods.random import Random
from kvp.strategies.methods.recalkv import ReCalKV
from kvp.strategies.methods.regrow import Regrow
from kvp.strategies.methods.search_llm import SearchLLM
from kvp.strategies.methods.shortened_llm import ShortenedLLM
from kvp.strategies.methods.shortgpt import ShortGPT
from kvp.strategies.methods.sleb import SLEB
from kvp.strategies.methods.slicegpt import SliceGPT
from kvp.strategies.methods.sparsegpt import SparseGPT
from kvp.strategies.methods.svd_llm_v2 import SVDLLMv2
from kvp.strategies.methods.think import ThinK
from kvp.strategies.methods.transmla import TransMLA
from kvp.strategies.methods.wanda import Wanda
from kvp.strategies.methods.wanda_sp import WandaSP
from kvp.strategies.search.evolution import Evolution
from kvp.types import Budget
