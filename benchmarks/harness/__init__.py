"""What every benchmark uses: a `Contest` of `Provider`s (contest.py) over a problem (head_problem.py), who are proven
(proof.py) before they are timed in turn (race.py, device.py) and become rows (results.py); models.py and options.py are for
programs that run whole training steps."""
