"""One self-contained HTML report, the picture of a drift curve, and the summary table of a run."""

from steer.report.drift_plot import drift_figure
from steer.report.page import write_report
from steer.report.summary import summary_table

__all__ = ["drift_figure", "summary_table", "write_report"]
