"""Rows of data become Examples. No model here.

columns.py    whose column names a row uses, and what they mean
videos.py     videos as images: frames evenly spaced
sources.py    what a path, a pattern, a folder or a hub name stands for
readers.py    rows by number out of JSON Lines, JSON, CSV, Parquet and `datasets`
pictures.py   images opened with care; the labelled pictures behind bundled questions
tasks.py      the bundled questions
dataset.py    `load_examples`: any source as Examples by number
held_out.py   a part of a data set for evaluation, with pictures that no other row shows
streams.py    training examples without end, shuffled or mixed, with a position to save
streamed.py   the same of data that are read as they come
check.py      which rows are faulty, found by several processes and kept
rows.py       rows written out again, their images beside the new file
resample.py   a selection of questions whose accuracies have a wanted histogram
questions/    chats, options, the gold answer
labelling/    `kind` and `should_change` for data that lacks them

To read columns named otherwise, add a `Convention` in columns.py; to add a bundled question, a function in `tasks.TASKS`.
"""
