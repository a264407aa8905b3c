"""Sequences in rows without padding, prompts shared by their completions (docs/packing.md).

`pack` makes `PackedBatch`es from segments, `plan` decides what shares a row, `layout` says which token sees which, and
`attention` chooses who computes that: `flash`, `flex` or `sdpa`. To add an attention: a function in a file of its own
with the signature of those, in `attention.IMPLEMENTATIONS`, with its condition in `attention.choose`; the tests of
tests/model/test_attention.py then hold it to a dense mask.
"""
