"""What a completion is worth: reward functions by name or dotted path, and their weighted sum. No torch here.

`scorer.Scorer` is what runs use; it has the table of built-in functions. `columns` is what functions are given, `results`
what they return, `calls` holds faults and time limits, `loading` finds a function by what a recipe says, `peers` calls those
of verl and EasyR1, `forms` says what each built-in function wants written around an answer, and what it reads. `reading/` is the one reader of
answers: where one stands, which form it has, whether two are equal. `math.equal_values` compares formulas in a process of its own.

To add a reward, write `f(prompts, completions, **columns) -> list of float or None` into the file of its
kind (`answers`, `choice`, `math`, `boxes`, `sequences`, `judge`, `shaping`), with its options as
keyword-only arguments, and name it in `scorer.BUILT_IN` and `forms.READS`; or in a file of your own: docs/rewards.md.
"""
