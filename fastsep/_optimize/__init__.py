"""fastsep.optimize: finds what the kernels can compute in any nn.Module, and has them compute it.

trace.py makes a graph of a module, chains.py reads its nodes, patterns.py finds what can be fused and says why
the rest cannot, steps.py holds what is run instead, rewrite.py puts the two together, and forward.py takes a
module's forward over for as long as that is safe.
"""

from .api import optimize, report, revert
from .report import Candidate, Report

__all__ = ["Candidate", "Report", "optimize", "report", "revert"]
