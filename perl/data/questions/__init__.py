"""What a row asks and what is right, whatever it keeps them in.

chats.py      a text or a chat as messages with a slot for each image
options.py    options in columns of their own, written under the question
golds.py      the gold answer, by letter where there are options, and whether a response contradicts it
literals.py   lists and objects that data hold as texts
"""
