"""Collect docs/benchmarks/ into docs/claims.md, its picture, and the README's table."""

import sys
from pathlib import Path

from jobs.benchmarks.claims import find, plot, render, render_page, replace_table
from jobs.cli import run_guarded

_DOCS = Path("docs")


def write_claims() -> None:
    """Write all three."""
    findings = find(_DOCS / "benchmarks")
    (_DOCS / "claims.md").write_text(render_page(findings), encoding="utf-8")
    plot(findings, _DOCS / "claims.png")
    readme = Path("README.md")
    text = replace_table(
        readme.read_text(encoding="utf-8"), render(findings, links_to="docs/benchmarks/")
    )
    readme.write_text(text, encoding="utf-8")
    print(render(findings, links_to="docs/benchmarks/"))


if __name__ == "__main__":
    sys.exit(run_guarded(write_claims))
