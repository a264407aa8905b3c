"""Decoding with shared prompts: a prompt's keys and values are kept once and read once a step for all its completions.

`cache` holds them, `attention` attends to a prompt and to a completion's own tokens apart, `step` runs the decoder on one
token a row, `graph` replays that on a GPU, `sampling` draws tokens, and `slots` is what goes on at a time.
"""
