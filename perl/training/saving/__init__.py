"""What a run leaves and goes on from.

checkpoint.py  atomic checkpoints, the newest and the best; extend.py more steps for a run that is there
export.py      model folders and adapters; hub.py pushes them
"""
