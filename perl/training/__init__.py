"""A run: its stages, the loop, the optimizer, what is saved and how it goes on. Heavy: import from the files.

train.py       the stages of a run in turn; `RUNS` says what each kind does
reinforce.py   the loop: examples to groups to packed rows to an optimizer step
cold_start.py, filter_stage.py, measure.py   the other kinds of stages, and the evaluations between them
session.py     gives a stage its steps, records and saves them, goes on after a kill
components.py  model, engine, collector and loss of a stage; checks.py what is looked at before a run begins
optimizer.py   AdamW over micro-batches and processes, the learning rate
parallel/      how the processes of a run share its work
saving/        checkpoints, model folders, the hub; summary.py what a run comes to
commands.py    `perl-rl train`, `resume`, `report`, `config`, `doctor`; profile.py and doctor.py what they say

To add a kind of stage: a function of (session, stage), in `train.RUNS` and in `STAGE_KINDS` of perl/recipe.py. To change the
schedule of the learning rate: `optimizer.Schedule` and `train.schedule` in perl/config.py.
"""
