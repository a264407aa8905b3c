"""Sampling by vLLM servers, which are reached over HTTP alone.

`engine.py` answers as the other engines do; `client.py` speaks a server's routes; `pictures.py` brings each picture to a server
once; `weights.py` gives servers the weights that are trained; `plugin.py` is loaded by vLLM itself, in its own environment.
"""
