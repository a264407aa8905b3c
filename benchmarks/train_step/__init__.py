"""One training step padded, packed and shared: workload.py makes it, variants.py runs it, measure.py proves and times it."""
