"""fastsep.optimize: finds what the kernels can compute in any nn.Module, and has them compute it.

trace.py makes a graph of a module and regions.py of a model's parts, chains.py reads its nodes, patterns.py
finds what can be fused and says why the rest cannot, surroundings.py and shuffles.py what is around that,
steps.py, series.py and live.py hold what is run instead, rewrite.py puts it into the graph, aliases.py says
which memory it shares, formats.py in which memory format its results are, layouts.py in which it may run,
program.py makes a function of it, plans.py does all of this in turn, and forward.py takes a module's forward
over while that is safe.
"""

from .api import optimize, report, revert
from .report import Candidate, Report

__all__ = ["Candidate", "Report", "optimize", "report", "revert"]
