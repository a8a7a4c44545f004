"""A report as people read it: Markdown, and one HTML file that needs nothing else.

Both are made of report.json's content alone: no clock, no machine, the same bytes again. Names of tensors and files
come from strangers; neither page runs them. `document` is what both say; `sentence` is the verdict for a terminal.
"""

from exporter.validate.report.html import html
from exporter.validate.report.markdown import markdown
from exporter.validate.report.page import document
from exporter.validate.report.words import sentence

__all__ = ["document", "html", "markdown", "sentence"]
