"""Labels: which images of a question may change places, and whether its answer then follows.

command.py    `perl-rl label` and its options
file.py       the labelled file, which a stopped labelling goes on with
label.py      what a label is, and whether it holds in every order
rules.py      labels by rules: the parts of a question (text.py), and the forms that are allowed (grammar.py)
llm.py        labels and multiple choice by a language model

To change the rules, begin with a row in the table of tests/data/labelling/test_rules.py.
"""
