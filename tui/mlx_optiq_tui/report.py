"""A whole report on a terminal: facts, comparison, curve, heat maps, tables."""

from mlx_optiq_ext.types.report import Report
from mlx_optiq_tui.ansi import Style, paint
from mlx_optiq_tui.curve import draw_curve
from mlx_optiq_tui.heat_map import draw_bits_map, draw_sensitivity_map
from mlx_optiq_tui.table import draw_table, wrapped

__all__ = ["draw_report"]


def draw_report(report: Report, style: Style) -> str:
    """Draw every part that the report has.

    Args:
        report: What to show.
        style: Colours and width; nothing is drawn beyond the width.
    Returns:
        Text without a trailing newline.
    """
    sections = [paint(report.title, style, bold=True) + "\n" + "═" * min(len(report.title), style.width)]
    if report.facts:
        sections.append(_facts(report.facts, style))
    if report.comparison:
        sections.append(draw_table(report.comparison, style))
    if report.curve:
        sections.append(draw_curve(report.curve, style))
    if report.heat_map:
        sections += [draw_bits_map(report.heat_map, style), draw_sensitivity_map(report.heat_map, style)]
    sections += [draw_table(t, style) for t in (report.bits, report.domains, report.pins) if t is not None]
    remarks = [*(f"missing: {text}" for text in report.missing), *(f"note: {text}" for text in report.notes)]
    sections.append("\n".join(line for text in remarks for line in wrapped(text, style.width, "  ")))
    return "\n\n".join(section for section in sections if section)


def _facts(facts: tuple[tuple[str, str], ...], style: Style) -> str:
    name_width = max(len(name) for name, _ in facts)
    lines = []
    for name, value in facts:
        first, *rest = wrapped(value, style.width - name_width - 2) or [""]
        lines.append(paint(f"{name:<{name_width}}", style, dim=True) + f"  {first}")
        lines += [" " * (name_width + 2) + line for line in rest]
    return "\n".join(lines)
