"""`perl-rl preview`: what a model will be shown, without its weights.

* `command.Preview`: the command; what stands first is a recipe or data.
* `recipe`: a recipe's questions through its chat template, and what its rewards give for a right answer.
* `rows`: the rows of data, each in some orders of its images or refused; `listing` writes them to the terminal and as
  JSON, `page` as a page with the pictures.
"""
