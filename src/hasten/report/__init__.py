"""Run folders or a study in, one offline HTML page and its pictures out."""

from hasten.report.page import write_report
from hasten.report.study_page import write_study_report

__all__ = ["write_report", "write_study_report"]
