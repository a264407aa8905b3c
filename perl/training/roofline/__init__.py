"""`perl-rl plan`: what a training step has to compute, move and keep, counted from the model's sizes, and how long that
takes a device at least. Nothing is run; all of it is computed.

devices.py and model.py hold facts, step.py counts work by stage, memory.py bytes, advice.py says what to change where these do
not fit; command.py and picture.py show it.
"""
