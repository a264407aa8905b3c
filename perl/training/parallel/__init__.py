"""How the processes of a run share its work.

balancing.py  what groups cost, and which process trains on which
mesh.py       over which processes weights are sharded
"""
