"""Self-contained pages of an experiment and of a circuit, summary table and chart of an experiment, and the picture of a drift curve."""

from steer.report.circuit_page import write_circuit
from steer.report.drift_plot import drift_figure
from steer.report.page import write_report
from steer.report.primary_plot import comparison_figure
from steer.report.summary import summary_table

__all__ = ["comparison_figure", "drift_figure", "summary_table", "write_circuit", "write_report"]
