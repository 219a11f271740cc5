"""HTML and PNG: self-contained, well-formed, every cell in its colour and place, no label over another."""

import io
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from msgspec.structs import replace
from PIL import Image
from support_tables import DENSE, MOE, make_allocation, make_score, make_table

from mlx_optiq_ext.quant.picture import Dot, Rect, Text, text_width
from mlx_optiq_ext.quant.picture_curve import curve_scene
from mlx_optiq_ext.quant.picture_heat import bits_scene, sensitivity_scene
from mlx_optiq_ext.quant.report import build_report
from mlx_optiq_ext.quant.report_html import render_html, scene_svg
from mlx_optiq_ext.quant.report_png import render_png, report_scenes
from mlx_optiq_ext.types.palette import bits_color
from mlx_optiq_ext.types.report import CurvePoint, Report

SIZES = [(30, DENSE), (80, MOE), (1, DENSE), (126, DENSE)]


def make_report(blocks: int = 30, modules: tuple[str, ...] = DENSE) -> Report:
    table = make_table(blocks, modules)
    line = [CurvePoint(bpw=3.5 + i / 4, divergence=2.0 * 4.3 ** -(i / 4)) for i in range(17)]
    allocation = make_allocation(table)
    return build_report("m", table=table, allocation=allocation, score=make_score(), predicted=line)


class _Checker(HTMLParser):
    """Collects tags and attributes, and that every tag is closed."""

    VOID = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_from_elsewhere_and_is_closed() -> None:
    page = render_html(make_report())
    checker = _Checker()
    checker.feed(page)
    assert not checker.open
    tags = {tag for tag, _ in checker.seen}
    assert not tags & {"script", "link", "img", "iframe", "object", "base"}
    assert not any(
        name in attributes for _, attributes in checker.seen for name in ("href", "src", "onclick")
    )
    assert "http" not in page
    assert "@import" not in page
    assert "url(" not in page
    assert "prefers-color-scheme: dark" in page


def test_the_page_escapes_what_comes_from_outside() -> None:
    report = replace(make_report(), title="<script>alert(1)</script>", notes=("a < b & c",))
    page = render_html(report)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "a &lt; b &amp; c" in page


def test_every_ink_of_the_page_is_defined_for_light_and_dark() -> None:
    page = render_html(make_report())
    inks = set(re.findall(r"var\(--([a-z]+)\)", page))
    assert len(inks) >= 3
    for name in inks:
        assert len(re.findall(rf"--{name}:#[0-9a-f]{{6}};", page)) == 2


@pytest.mark.parametrize(("blocks", "modules"), SIZES)
def test_every_cell_is_drawn_once_in_its_colour_without_overlap(
    blocks: int, modules: tuple[str, ...]
) -> None:
    report = make_report(blocks, modules)
    assert report.heat_map is not None
    scene = bits_scene(report.heat_map)
    assert scene is not None
    rects = {
        shape.tip.split("\n")[0]: shape for shape in scene.shapes if isinstance(shape, Rect) and shape.tip
    }
    cells = (*report.heat_map.cells, *report.heat_map.outside)
    assert set(rects) == {cell.path for cell in cells}
    assert all(rects[cell.path].fill == bits_color(cell.bits or 0) for cell in cells)
    assert not _overlapping([_box(rect) for rect in rects.values()])


@pytest.mark.parametrize(("blocks", "modules"), SIZES)
def test_texts_neither_overlap_nor_leave_the_picture(blocks: int, modules: tuple[str, ...]) -> None:
    for scene in report_scenes(make_report(blocks, modules)):
        boxes = [_text_box(shape) for shape in scene.shapes if isinstance(shape, Text)]
        assert not _overlapping(boxes), scene.title
        assert all(box[0] >= -1 and box[2] <= scene.width + 1 for box in boxes), scene.title
        assert all(box[1] >= -1 and box[3] <= scene.height + 1 for box in boxes), scene.title


def test_long_facts_and_notes_are_whole_and_within_the_picture() -> None:
    words = (
        "imported from a Q4_1 GGUF file: its weights lie on a 4-bit grid already, divergence is from these"
    )
    report = replace(make_report(2), facts=(("reference weights", f"{words}, {words}"),), notes=(words * 2,))
    scenes = report_scenes(report)
    assert scenes[-1].title == "Notes"
    for scene in (scenes[0], scenes[-1]):
        texts = [shape for shape in scene.shapes if isinstance(shape, Text)]
        assert " ".join(shape.text for shape in texts).count("4-bit grid already") == 2
        assert all(_text_box(shape)[2] <= scene.width for shape in texts)
        assert all(shape.y <= scene.height for shape in texts)


def test_labels_hide_no_point() -> None:
    report = make_report()
    assert report.curve is not None
    scene = curve_scene(report.curve)
    assert scene is not None
    dots = [
        (s.x - s.radius, s.y - s.radius, s.x + s.radius, s.y + s.radius)
        for s in scene.shapes
        if isinstance(s, Dot)
    ]
    labels = [
        _text_box(s) for s in scene.shapes if isinstance(s, Text) and s.size == 12 and s.anchor == "start"
    ]
    assert len(labels) >= 6
    assert not any(_meets(dot, label) for dot in dots for label in labels)


def test_scenes_are_well_formed_svg_with_tooltips() -> None:
    for scene in report_scenes(make_report()):
        root = ElementTree.fromstring(scene_svg(scene))
        assert root.tag == "svg"
    heat = make_report().heat_map
    assert heat is not None
    scene = sensitivity_scene(heat)
    assert scene is not None
    assert "model.layers.29.mlp.down_proj" in scene_svg(scene)


@pytest.mark.parametrize("is_dark", [False, True])
def test_the_png_shows_the_bits_where_the_scene_puts_them(is_dark: bool) -> None:
    report = Report(title="m", heat_map=make_report().heat_map)
    data = render_png(report, scale=1, is_dark=is_dark)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scene = report_scenes(report)[0]
    assert image.width == scene.width + 80
    top = 40 + 46 + 48  # margin, title, heading of the scene
    for shape in scene.shapes:
        if isinstance(shape, Rect) and shape.tip:
            pixel = image.getpixel((round(40 + shape.x + 4), round(top + shape.y + 4)))
            assert pixel == tuple(int(shape.fill[i : i + 2], 16) for i in (1, 3, 5))


def test_the_same_report_gives_the_same_bytes() -> None:
    assert render_html(make_report(4)) == render_html(make_report(4))
    assert render_png(make_report(4), scale=1) == render_png(make_report(4), scale=1)


def test_an_empty_report_can_be_drawn() -> None:
    assert render_png(Report(title="nothing"), scale=1).startswith(b"\x89PNG")
    assert "<h1>nothing</h1>" in render_html(Report(title="nothing"))


def test_pillow_is_asked_for_in_words_where_it_is_missing() -> None:
    code = (
        "import sys; sys.modules['PIL'] = None\n"
        "from mlx_optiq_ext.errors import UsageError\n"
        "from mlx_optiq_ext.quant.report_png import render_png\n"
        "from mlx_optiq_ext.types.report import Report\n"
        "try: render_png(Report(title='m'))\n"
        "except UsageError as error: print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "mlx-optiq-ext[report]" in out


def _box(rect: Rect) -> tuple[float, float, float, float]:
    return rect.x, rect.y, rect.x + rect.width, rect.y + rect.height


def _text_box(text: Text) -> tuple[float, float, float, float]:
    # Letters are narrower than the layout assumes; digits of narrow cells are taken at their real width.
    width = text_width(text.text, text.size) * 0.8
    left = text.x - {"start": 0.0, "middle": width / 2, "end": width}[text.anchor]
    return left, text.y - text.size * 0.75, left + width, text.y + text.size * 0.2


def _meets(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] - 0.01 and b[0] < a[2] - 0.01 and a[1] < b[3] - 0.01 and b[1] < a[3] - 0.01


def _overlapping(boxes: list[tuple[float, float, float, float]]) -> list[tuple[object, object]]:
    ordered = sorted(boxes)
    found: list[tuple[object, object]] = []
    for index, box in enumerate(ordered):
        for other in ordered[index + 1 :]:
            if other[0] >= box[2]:
                break
            if _meets(box, other):
                found.append((box, other))
    return found
