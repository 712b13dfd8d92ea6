"""Self-contained HTML pages of experiments and of features; summary table and chart of an experiment, picture of a drift curve."""

from steer.report.drift_plot import drift_figure
from steer.report.feature_page import write_feature_page
from steer.report.page import write_report
from steer.report.primary_plot import comparison_figure
from steer.report.summary import summary_table

__all__ = ["comparison_figure", "drift_figure", "summary_table", "write_feature_page", "write_report"]
