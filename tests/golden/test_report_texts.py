"""What people read, to the letter: terminal report, model card, snippets.

``python tests/golden/test_report_texts.py`` writes the stored texts anew; look at the difference.
"""

from pathlib import Path

import pytest
from support_tables import MOE, curve_points, make_allocation, make_score, make_table

from mlx_optiq_ext.hub.card import CardFacts, License, render_card
from mlx_optiq_ext.quant.report import build_report
from mlx_optiq_ext.types.report import CurvePoint, Report
from mlx_optiq_integrations.usage import snippets_markdown, snippets_text, usage_snippets
from mlx_optiq_tui.ansi import Style
from mlx_optiq_tui.report import draw_report

STORED = Path(__file__).parent / "report"


def dense_report() -> Report:
    table = make_table()
    points = curve_points(table, (3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 6.5))
    return build_report(
        "base-135m-5.0",
        table=table,
        allocation=make_allocation(table),
        score=make_score(),
        predicted=[CurvePoint(bpw=bpw, divergence=divergence) for bpw, divergence in points],
    )


def moe_report() -> Report:
    table = make_table(blocks=80, modules=MOE)
    missing = ["comparison: no optiq/score.json; make it with optiq score"]
    return build_report("moe-80", table=table, allocation=make_allocation(table), missing=missing)


def card() -> str:
    report = dense_report()
    return render_card(
        CardFacts(
            name="example/base-135m-5.0",
            base_model="example/base-135m",
            base_revision="0123456789abcdef",
            license=License(id="apache-2.0"),
            summary=report.facts,
            comparison=report.comparison,
            domains=report.domains,
            bits=report.bits,
            pins=report.pins,
            calibration_sha256="ab" * 32,
            held_out_sha256="cd" * 32,
            command="optiq convert example/base-135m --target-bpw 5.0 -o base-135m-5.0",
            package_version="1.0",
            usage=snippets_markdown(usage_snippets("example/base-135m-5.0")),
            notes=("8 units of block_3 were | not seen",),
        )
    )


TEXTS = {
    "dense.txt": lambda: draw_report(dense_report(), Style()) + "\n",
    "moe.txt": lambda: draw_report(moe_report(), Style()) + "\n",
    "dense-256.ansi": lambda: draw_report(dense_report(), Style(colors="256", width=100)) + "\n",
    "dense-truecolor.ansi": lambda: draw_report(dense_report(), Style(colors="truecolor", width=100)) + "\n",
    "card.md": card,
    "usage-chat.txt": lambda: snippets_text(usage_snippets("out dir/it's")) + "\n",
    "usage-base.txt": lambda: snippets_text(usage_snippets("me/base", is_chat=False)) + "\n",
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_is_as_stored(name: str) -> None:
    assert TEXTS[name]() == (STORED / name).read_text(encoding="utf-8")


if __name__ == "__main__":
    for name, make in TEXTS.items():
        (STORED / name).write_text(make(), encoding="utf-8")
