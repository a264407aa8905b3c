"""Decoding beside transformers' `generate`: sides.py runs both, counts.py counts a step, measure.py proves and times."""
