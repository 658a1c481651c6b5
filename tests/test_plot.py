"""Plots: what is in them can be seen, and read."""

import io
import itertools
from dataclasses import replace

import pytest
from reports import report, timing

from fastsep._case import format_case, parse_case
from fastsep.bench import layers, peers, plot
from fastsep.bench.report import Row

image = pytest.importorskip("matplotlib.image")


def report_of(cases, *others):
    """A result of layers that nobody measured."""
    names = {"fastsep": 1.1, "torch nchw": 1.5, "torch nhwc": 1.4} | dict.fromkeys(others, 1.2)
    rows = []
    for case in cases:
        operations = layers.operations(case)
        times = {name: timing(operations / 1e11 * factor, 0.04) for name, factor in names.items()}
        rows.append(Row(case.name, format_case(case), times, operations, 1e6, 1e11))
    return report(rows=rows)


MANY = [parse_case(f"name=stage.{i}.convolution c={i + 1} h=9 w=9 k=64 kh=3 kw=3") for i in range(60)]
REPORTS = {
    "sizes": report_of(layers.load("sizes").layers),
    "xception": report_of(layers.load("xception").layers),
    "deeplab": report_of(layers.load("deeplab").layers),
    "mobilenet_v1": report_of(layers.load("mobilenet_v1").layers, "compile"),
    "mobilenet_v2": report_of(layers.load("mobilenet_v2").layers, *peers.RUNTIMES),
    "many": report_of(MANY),
}


def colours(picture):
    """Of the pixels of a PNG, row by row."""
    pixels = (image.imread(io.BytesIO(picture), format="png")[..., :3] * 255).round().astype(int)
    return (pixels << [16, 8, 0]).sum(-1)


def number(colour):
    return int(colour[1:], 16)


def longest_run(mask):
    """Of neighbours in a line, of all lines."""
    return max(sum(1 for _ in run) for line in mask for key, run in itertools.groupby(line) if key)


@pytest.mark.parametrize("rows", [1, 2])
def test_every_contender_and_the_roof_are_seen(rows):
    made = report(rows=report().rows[:rows])
    found = colours(plot.draw(made, "png"))
    for name in ("fastsep", "torch", "onnxruntime"):
        assert (found == number(plot.COLOURS[name])).mean() > 0.005, name  # the legend has a tenth of that
    assert not (found == number(plot.COLOURS["ncnn"])).any()
    # A line far longer than any stroke of a letter: down the figure, or along each layer.
    ink = found == number(plot.INK)
    assert longest_run(ink.T if rows == 1 else ink) > 250
    fewer = {name: t for name, t in made.rows[0].times.items() if name != "onnxruntime"}
    without = replace(made, rows=[replace(row, times=fewer) for row in made.rows])
    assert not (colours(plot.draw(without, "png")) == number(plot.COLOURS["onnxruntime"])).any()


@pytest.mark.parametrize("kind", sorted(plot.SUFFIXES))
def test_all_formats_are_drawn(kind):
    head = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[kind]
    assert plot.draw(report(), kind[1:]).startswith(head)


def shown_texts(figure):
    """All that are drawn: an axis also keeps labels beyond its ends."""
    texts = list(figure.texts)
    for axes in figure.axes:
        texts += [*axes.texts, axes.xaxis.label, axes.yaxis.label, axes._left_title]
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            texts += [tick.label1 for tick in ticks if low <= tick.get_loc() <= high]
    return [text for text in texts if text.get_visible() and text.get_text()]


@pytest.mark.parametrize("name", REPORTS)
def test_no_text_lies_on_another(name):
    figure = plot.figure(REPORTS[name])
    figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown_texts(figure)]
    assert len(boxes) > 25
    for (one, box), (other, its) in itertools.combinations(boxes, 2):
        assert not box.overlaps(its), (one, other)
    for text, box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, text


def test_axes_over_decades_are_labelled():
    figure = plot.figure(REPORTS["sizes"])
    figure.draw_without_rendering()
    labels = [label.get_text() for label in figure.axes[1].xaxis.get_ticklabels()]
    assert {"5", "10", "20", "50", "100", "200", "500", "1000"} <= set(labels)


def test_equal_layers_are_one_where_there_are_many():
    rows, labels = plot._bars_of(REPORTS["xception"])
    assert len(rows) == 10
    assert [lines[-1] for lines in labels if "layers" in lines[-1]] == ["25 layers"]
    assert len(plot._bars_of(REPORTS["mobilenet_v1"])[0]) == 13


def test_equal_layers_show_the_median_and_all_quartiles():
    row = report().rows[0]
    times = [timing(seconds, 0.1) for seconds in (1.0, 2.0, 9.0)]
    merged = plot._merged([replace(row, times={"fastsep": t}) for t in times]).times["fastsep"]
    assert (merged.median, merged.low, merged.high) == (2.0, times[0].low, times[2].high)
