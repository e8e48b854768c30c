"""`modelq report`: what quantization did to a model, on one HTML page that needs no network and no other file."""
from modelq.report.facts import Facts, gather
from modelq.report.page import html_page

__all__ = ["Facts", "gather", "html_page"]
