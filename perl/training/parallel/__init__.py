"""How the processes of a run share its work.

balancing.py  what groups cost, and how they are dealt out so that few of them move
gradients.py  gradients summed over processes, and their norm
mesh.py       over which processes weights are sharded
rows.py       rows of sharded weights, planned for all processes together
"""
