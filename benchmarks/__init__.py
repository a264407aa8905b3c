"""Measurements beside other implementations; README.md says what and how.

`bench_*.py` are the cases: most give `contests(cuda, quick)`, which pytest runs (`conftest.py`) and `compare.py` lists; the
last two are programs. `providers/` has who takes part, `harness/` what proves and times them, `train_step/` and `trainer/` what
the two programs run, `report/` what is made of the figures; `run.py` does all of it.

To add a case: another `Contest` in a `contests`. To add somebody's implementation: `providers/`.
"""
