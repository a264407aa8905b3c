"""A step of PeRL's trainer beside one of TRL's: start.py is given to both, agreement.py proves, measure.py counts and times."""
