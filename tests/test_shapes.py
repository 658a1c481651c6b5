"""benchmarks/shapes/ holds what the networks' own definitions say."""

import pytest
import shapes

from fastsep._case import parse_case
from fastsep.bench import layers


@pytest.mark.parametrize("file", shapes.FILES)
def test_shapes_are_those_of_the_network(file):
    assert (shapes.FOLDER / f"{file}.txt").read_text(encoding="utf-8") == shapes.text(file)


def geometry(case):
    return case.c, case.h, case.w, case.k, case.kh, case.kw, case.sh, case.sw, case.pt, case.pl


def test_mobilenet_v1_is_that_of_timm():
    """Its file names the blocks as the paper does."""
    found = [layer.case for layer in shapes.layers(shapes.Source("", "mobilenetv1_100", 224))]
    assert list(map(geometry, found)) == list(map(geometry, layers.load("mobilenet_v1").layers))


@pytest.mark.parametrize(
    ("file", "count", "gates"),
    [
        ("mobilenet_v2", 17, 0),
        ("mobilenet_v3_large", 15, 8),
        ("mobilenet_v3_small", 11, 9),
        ("efficientnet_b0", 16, 16),
        ("convnext_tiny", 18, 0),
        ("xception", 34, 0),
        ("xception_71", 34, 0),
    ],
)
def test_counts_of_the_papers(file, count, gates):
    lines = (shapes.FOLDER / f"{file}.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert len(lines) == count
    assert sum("a gate lies between" in line for line in lines) == gates
    assert all("  # " in line for line in lines)


@pytest.mark.parametrize("file", layers.names())
def test_every_line_names_its_layer(file):
    """The network it is of, too, where the file's first line does not."""
    lines = (shapes.FOLDER / f"{file}.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert all(len(line.partition("  # ")[2]) > 10 for line in lines[1:])


def test_deeplab_is_dilated():
    assert {
        parse_case(str(line)).dh for line in (shapes.FOLDER / "deeplab.txt").read_text().splitlines()[1:]
    } == {2, 4}
