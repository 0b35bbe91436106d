"""The single-file HTML page that the reports of datagen and train share.

`page.py` is the page, `plots.py` its figures, `inputs.py` what both reports read.
"""

from report.page import Card, Page

__all__ = ["Card", "Page"]
