"""Self-contained pages of experiments, features, circuits and edits; summary table, chart, drift curves and stage comparisons."""

from steer.report.circuit_page import write_circuit
from steer.report.drift_plot import drift_figure
from steer.report.edit_page import write_edits
from steer.report.feature_page import write_feature_page
from steer.report.page import write_report
from steer.report.primary_plot import comparison_figure
from steer.report.stage_plot import stage_figure
from steer.report.summary import summary_table
from steer.report.trace_page import write_trace
from steer.report.trace_plot import trace_figure

__all__ = [
    "comparison_figure",
    "drift_figure",
    "stage_figure",
    "summary_table",
    "trace_figure",
    "write_circuit",
    "write_edits",
    "write_feature_page",
    "write_report",
    "write_trace",
]
