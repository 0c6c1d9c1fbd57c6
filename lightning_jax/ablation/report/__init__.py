"""The report of a sweep: which differences are real, and what they cost.

summary = report.write_report("runs/pattern")   # report.html, .json, .csv, report_<figure>.png
report.print_report(summary)
"""

from lightning_jax.ablation.report.writing import (
    has_routers,
    print_report,
    read_sweep,
    write_report,
)

__all__ = ["has_routers", "print_report", "read_sweep", "write_report"]
