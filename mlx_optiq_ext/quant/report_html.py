"""A report as one self-contained HTML page: inline SVG, no scripts, nothing fetched, light and dark."""

from collections.abc import Sequence
from html import escape

from mlx_optiq_ext.quant.picture import INKS, Dot, Line, Path, Rect, Scene, Shape, Text
from mlx_optiq_ext.quant.picture_curve import curve_scene
from mlx_optiq_ext.quant.picture_heat import bits_scene, sensitivity_scene
from mlx_optiq_ext.types.report import Report, TextTable

__all__ = ["render_html", "scene_svg", "svg_document"]

_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
_STYLE = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 FONT; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 40px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 20px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 44px 0 4px; }
p.sub { margin: 0 0 14px; color: var(--muted); font-size: 13.5px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 0; padding: 16px 20px;
  background: var(--panel); border-radius: 8px; font-size: 14px; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; border-bottom: 1px solid var(--grid); text-align: right; white-space: nowrap; }
th { color: var(--muted); font-weight: 500; }
th.word, td.word { text-align: left; }
th:first-child, td:first-child { padding-left: 0; }
td:last-child, th:last-child { padding-right: 0; }
tr.this td { font-weight: 650; color: var(--chosen); }
svg { display: block; width: 100%; height: auto; min-width: 640px; font-family: FONT; }
ul { padding-left: 20px; font-size: 14px; } footer { margin-top: 48px; color: var(--muted); font-size: 13px; }
@media (max-width: 720px) {
  main { padding: 20px 16px 40px; } dl { grid-template-columns: 1fr; } dd { margin-bottom: 6px; }
}
@media print {
  main { max-width: none; padding: 0; } h2 { break-after: avoid; } svg, table { break-inside: avoid; }
}
"""


def render_html(report: Report) -> str:
    """Draw every part that the report has.

    Args:
        report: What to show.
    Returns:
        A whole HTML document, UTF-8, the same bytes for the same report.
    """
    parts = [f"<h1>{escape(report.title)}</h1>"]
    if report.facts:
        items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in report.facts)
        parts.append(f"<dl>{items}</dl>")
    if report.comparison:
        parts.append(_table(report.comparison))
    if report.curve:
        parts.append(_figure(curve_scene(report.curve)))
    if report.heat_map:
        parts += [_figure(bits_scene(report.heat_map)), _figure(sensitivity_scene(report.heat_map))]
    parts += [_table(table) for table in (report.bits, report.domains, report.pins) if table]
    parts += [_list("Missing", report.missing), _list("Notes", report.notes)]
    body = "\n".join(part for part in parts if part)
    title = escape(report.title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>{_colors()}{_STYLE.replace('FONT', _FONT)}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n<footer>Made by optiq report.</footer>\n</main>\n</body>\n</html>\n"
    )


def scene_svg(scene: Scene) -> str:
    """A scene as an ``<svg>`` element whose named inks are CSS variables of the page."""
    view = f"0 0 {_round(scene.width)} {_round(scene.height)}"
    shapes = "\n".join(_shape(shape) for shape in scene.shapes)
    label = escape(scene.title, quote=True)
    return f'<svg viewBox="{view}" role="img" aria-label="{label}">\n{shapes}\n</svg>'


def svg_document(scene: Scene) -> str:
    """A scene with its heading as an SVG file of its own, light and dark as its viewer is."""
    heading = 48.0
    top = [
        Text(x=0, y=16, text=scene.title, size=17, is_bold=True),
        Text(x=0, y=35, text=scene.subtitle, ink="muted", size=12),
    ]
    width, height = _round(scene.width), _round(scene.height + heading)
    titles, shapes = ("\n".join(map(_shape, part)) for part in (top, scene.shapes))
    page = Rect(x=0, y=0, width=scene.width, height=scene.height + heading, fill="page")
    font = _FONT.replace('"', "'")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="{font}">\n<style>{_colors()}</style>\n{_shape(page)}\n{titles}\n'
        f'<g transform="translate(0 {_round(heading)})">\n{shapes}\n</g>\n</svg>\n'
    )


def _colors() -> str:
    light = "".join(f"--{name}:{colors[0]};" for name, colors in INKS.items())
    dark = "".join(f"--{name}:{colors[1]};" for name, colors in INKS.items())
    return f"\n:root {{{light}}}\n@media (prefers-color-scheme: dark) {{ :root {{{dark}}} }}"


def _figure(scene: Scene | None) -> str:
    if scene is None:
        return ""
    heading = f'<h2>{escape(scene.title)}</h2>\n<p class="sub">{escape(scene.subtitle)}</p>'
    return f'<section>\n{heading}\n<div class="wide">{scene_svg(scene)}</div>\n</section>'


def _table(table: TextTable) -> str:
    kinds = [' class="word"' if table.is_text(i) else "" for i in range(len(table.columns))]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, table.columns, strict=True))
    rows = []
    for index, row in enumerate(table.rows):
        mark = ' class="this"' if index == table.highlight else ""
        cells = "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
        rows.append(f"<tr{mark}>{cells}</tr>")
    body = "\n".join(rows)
    return (
        f'<section>\n<h2>{escape(table.title)}</h2>\n<p class="sub">{escape(table.note)}</p>\n'
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>\n'
        "</section>"
    )


def _list(title: str, items: Sequence[str]) -> str:
    if not items:
        return ""
    lines = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<section>\n<h2>{title}</h2>\n<ul>{lines}</ul>\n</section>"


def _shape(shape: Shape) -> str:
    if isinstance(shape, Rect):
        radius = f' rx="{_round(shape.radius)}"' if shape.radius else ""
        size = f'width="{_round(shape.width)}" height="{_round(shape.height)}"'
        box = f'x="{_round(shape.x)}" y="{_round(shape.y)}" {size}'
        return _with_tip("rect", f"{box}{radius} {_paint('fill', shape.fill)}", shape.tip)
    if isinstance(shape, Line):
        ends = (
            f'x1="{_round(shape.x1)}" y1="{_round(shape.y1)}" x2="{_round(shape.x2)}" y2="{_round(shape.y2)}"'
        )
        return f'<line {ends} {_paint("stroke", shape.ink)} stroke-width="{_round(shape.width)}"/>'
    if isinstance(shape, Path):
        points = " ".join(f"{_round(x)},{_round(y)}" for x, y in shape.points)
        line = f'{_paint("stroke", shape.ink)} stroke-width="{_round(shape.width)}" stroke-linejoin="round"'
        return f'<polyline points="{points}" fill="none" {line}/>'
    if isinstance(shape, Dot):
        return _dot(shape)
    weight = ' font-weight="600"' if shape.is_bold else ""
    anchor = f' text-anchor="{shape.anchor}"' if shape.anchor != "start" else ""
    place = f'x="{_round(shape.x)}" y="{_round(shape.y)}" font-size="{_round(shape.size)}"'
    return f"<text {place}{anchor}{weight} {_paint('fill', shape.ink)}>{escape(shape.text)}</text>"


def _dot(dot: Dot) -> str:
    fill, edge = (dot.ink, "page") if dot.is_filled else ("page", dot.ink)
    look = f'style="fill:{_value(fill)};stroke:{_value(edge)}" stroke-width="{1.5 if dot.is_filled else 2.5}"'
    if not dot.is_diamond:
        place = f'cx="{_round(dot.x)}" cy="{_round(dot.y)}" r="{_round(dot.radius)}"'
        return _with_tip("circle", f"{place} {look}", dot.tip)
    reach = dot.radius * 1.2
    corners = ((0, -reach), (reach, 0), (0, reach), (-reach, 0))
    points = " ".join(f"{_round(dot.x + dx)},{_round(dot.y + dy)}" for dx, dy in corners)
    return _with_tip("polygon", f'points="{points}" {look}', dot.tip)


def _with_tip(tag: str, attributes: str, tip: str) -> str:
    if not tip:
        return f"<{tag} {attributes}/>"
    return f"<{tag} {attributes}><title>{escape(tip)}</title></{tag}>"


def _paint(attribute: str, ink: str) -> str:
    return f'{attribute}="{ink}"' if ink.startswith("#") else f'style="{attribute}:{_value(ink)}"'


def _value(ink: str) -> str:
    return ink if ink.startswith("#") else f"var(--{ink})"


def _round(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
