"""What a policy can do: on held-out examples, on public benchmarks, on each question of a training set.

* `evaluate.evaluate` and `aggregate`: accuracy and consistency over image orders, in a run and by `perl-rl evaluate`;
  `agreement.Reading` is how a run's rewards read answers, `group_agreement` the consistency of a training group.
* `record`: an evaluation as a file with the scores of every example; `comparison`: two of those, paired.
* `suites/`: the eight benchmarks of the paper; see there to add one. `statistics` says how sure their numbers are.
* `difficulty`: how often a policy answers each question right, kept in a `MeasuredFile`; `selection.write_selection` keeps the
  questions that fit a histogram. `filter_command` and the filter stage of a run use both.
* `preview/`: `perl-rl preview`, rows of data in each order of their images, and a recipe's prompts.
* `completions`: some that are there already, put to the rows that they answer, for `perl-rl score`.
* `commands`, `generate`, `filter_command`, `score_command`, `check_command`: `perl-rl evaluate`, `compare`, `generate`, `filter`, `score`
  and `check`, each with its options.
"""
