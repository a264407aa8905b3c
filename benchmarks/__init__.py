"""Measurements beside other implementations; README.md says what and how.

`cases/` says what is measured, `providers/` who takes part, `harness/` proves and times them: under pytest (`test_cases.py`,
`conftest.py`), or in `compare.py` beside another revision. `bench_train_step.py`, `bench_decode.py` and `bench_trainer.py` are
programs, of what `train_step/`, `decode/` and `trainer/` hold. `report/` is what is made of the figures; `run.py` does all of it.

To add a case: `cases/`. To add somebody's implementation: `providers/`.
"""
