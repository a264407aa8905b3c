"""`tl` for PyTorch: the few elementary functions that `coefficient.py` is written in.

Triton's names and meanings, on tensors of any floating dtype.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

tl = SimpleNamespace(
    abs=torch.abs, exp=torch.exp, log=torch.log, sigmoid=torch.sigmoid, where=torch.where
)
