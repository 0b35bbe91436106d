"""The bundle's program: models/export.py joins these files into predict.py. They import each other alone."""
