"""Run folders in, one offline HTML page and its pictures out."""

from hasten.report.page import write_report

__all__ = ["write_report"]
