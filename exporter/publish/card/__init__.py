"""The model card of a repository, as text made of facts: pure, without a clock, a network or a file.

Facts come from manifest.json and report.json, which strangers may have written: every text of theirs is cleaned and
escaped where it is put into Markdown (markup.py) or YAML (head.py).
"""

from exporter.publish.card.facts import Item, Picture, Repository
from exporter.publish.card.page import MARK, page

__all__ = ["MARK", "Item", "Picture", "Repository", "page"]
