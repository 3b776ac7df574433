"""One results mapping in, one self-contained page and its pictures out."""

from pituning.report.html import PAGE, write_report

__all__ = ["PAGE", "write_report"]
