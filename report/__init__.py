"""The single-file HTML page that the reports of datagen and train share: `page.py` the page, `plots.py` its figures."""

from report.page import Card, Page

__all__ = ["Card", "Page"]
