"""Reports of a family: a page for people, and a card for each saved model. Reads records, never models."""

from pathprune.report.card import model_card
from pathprune.report.html import write_report

__all__ = ["model_card", "write_report"]
