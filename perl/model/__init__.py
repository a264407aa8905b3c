"""The model that is trained: loaded, fed with packed rows, and its loss at the head. Heavy: import from the files.

Others use `sources` (what a path stands for), `loading` (`check_model`, `load_policy`, `load_processor`: a path in, a Policy and a Processor
out; `weights` does the reading), `policy.Policy`, `processor.Processor`, `head` (the loss, where `perl_kernels` is called), `vision` (each image
through the tower once) and `tiny` (the demo's models). `layers` makes decoder layers faster; `padded` and
`padded_processor` train models that no family is written for; rows and attention are in `packed/`.

To add a family of models: a class in `families/` and its tiny model in `tiny.py`; docs/models.md goes through it.
"""
