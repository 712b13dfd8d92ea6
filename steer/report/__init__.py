"""One self-contained HTML page, the summary table and the chart of an experiment, pictures of drift curves and stage comparisons."""

from steer.report.drift_plot import drift_figure
from steer.report.page import write_report
from steer.report.primary_plot import comparison_figure
from steer.report.stage_plot import stage_figure
from steer.report.summary import summary_table

__all__ = ["comparison_figure", "drift_figure", "stage_figure", "summary_table", "write_report"]
