"""One static HTML page with every table and figure that a results folder has the cells for."""

from mabert.experiments.report.page import write_report

__all__ = ["write_report"]
