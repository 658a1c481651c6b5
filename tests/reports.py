"""A result that nobody measured."""

from dataclasses import replace

from fastsep.bench.engine import Timing
from fastsep.bench.report import Report, Row


def timing(seconds, spread=0.0, cores=1.0):
    return Timing(seconds, seconds * (1 - spread / 2), seconds * (1 + spread / 2), 9, cores)


def report(spread=0.0, cores=1.0, **changes):
    line = "name=one c=4 h=3 w=3 k=6 kh=3 kw=3 pt=1 pb=1 pl=1 pr=1"
    seconds = {"fastsep": 1.0, "unfrozen": 2.0, "torch nchw": 4.0, "torch nhwc": 5.0, "onnxruntime": 3.0}
    times = {name: timing(value, spread, cores) for name, value in seconds.items()}
    row = Row("one", line, times, operations=200.0, bytes=80.0, peak=400.0)
    cold = replace(row, name="two", cold=True)
    asked = {
        "whole": False,
        "phase": "forward",
        "batch": 1,
        "threads": 1,
        "layout": "nhwc",
        "dtype": "float32",
    }
    on = {"device": "cpu", "isa": "scalar", "machine": "m", "versions": {"torch": "2"}, "bandwidth": 100.0}
    return replace(Report("net", **asked, **on, rows=[row, cold]), **changes)
