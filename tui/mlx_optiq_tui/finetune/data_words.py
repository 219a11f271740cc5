"""What the data pane says of the rows in one or two lines."""

from collections.abc import Mapping, Sequence

__all__ = ["count_words", "lines_words", "summary_words"]


def count_words(rows: int) -> str:
    """So many rows."""
    return "1 row" if rows == 1 else f"{rows:,} rows"


def lines_words(lines: int) -> str:
    """So many lines."""
    return "1 line" if lines == 1 else f"{lines:,} lines"


def summary_words(
    count: int, problems: Mapping[int, str], not_taken: Sequence[str], listed: range, here: int | None
) -> str:
    """How many rows there are, how many to mend, and what is wrong with the one under the cursor.

    Args:
        count: Rows in all.
        problems: By index.
        not_taken: Lines of files that became no rows.
        listed: Indices of the rows that are shown.
        here: Index of the row under the cursor.
    """
    if not count and not not_taken:
        return "no rows yet: add one from a template (n), or import a file (i)"
    if not problems and not not_taken:
        said = f"{count_words(count)}, nothing wrong"
    else:
        said = f"{count_words(count)}, {len(problems):,} to mend"
        said += f", {lines_words(len(not_taken))} not taken" if not_taken else ""
        said += "; w lists them"
    if count > len(listed):
        said += f"; {listed.start + 1:,} to {listed.stop:,} listed, [ and ] go on"
    if here is not None and here in problems:
        said += f"\nrow {here + 1:,}: {problems[here]}"
    return said
