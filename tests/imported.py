"""What the processes of tests/forked.py find imported, after what the command line sets before it imports anything."""

# ruff: noqa: E402, F401

import gc
import os

from perl.cli import _prepare

_prepare(debug=False)
os.environ["OMP_NUM_THREADS"] = "1"

import accelerate.utils
import matplotlib.backends.backend_agg
import peft
import sklearn.datasets
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
import transformers.optimization

import perl.training.commands
import perl.training.train

gc.freeze()
