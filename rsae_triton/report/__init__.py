"""The report of a run: a self-contained HTML page, and the short table at the end of a run in the terminal."""

from rsae_triton.report.page import write_report
from rsae_triton.report.summary import summary_table

__all__ = ["summary_table", "write_report"]
