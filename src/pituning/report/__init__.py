"""One results mapping in, one self-contained page and its pictures out."""

from pituning.report.html import write_report

__all__ = ["write_report"]
