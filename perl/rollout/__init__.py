"""From examples to groups of scored rollouts.

`prompts.py` makes prompts of variants, with the `instruction.py` that says in which form to answer, `sample.py` rollouts of prompts, `collect.py` groups with signal of examples, with the
help of `filtering.py` (which groups are kept), `advantages.py` and `replay.py` (groups of earlier steps). Engines
(`engine.py` and `padded.py` in this process, `vllm/` on servers; `engines.py` chooses) answer `generate(prompts, params, seed)` with
the policy's present weights inside of `serving(version)`. `opening.py` finds a trained model and makes it ready to generate.
"""
