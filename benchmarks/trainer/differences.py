"""Where the two trainers do different work for the same step; part of the report."""

from __future__ import annotations

DIFFERENCES = (
    "Prompts and images: TRL repeats a prompt and its images for each of its completions, when it samples and when "
    "it trains; PeRL reads each ordered prompt once for its completions and encodes each image once when it samples "
    "and once when it trains, for all orders.",
    "Padding: TRL pads all sequences to the longest prompt of the step (left) and the longest completion (right); "
    "PeRL trains on packed rows and pads only the prompts that it samples from.",
    "Sampling: TRL calls transformers' generate with a key-value cache, PeRL its own loop with a key-value cache. Both "
    "sample in this process, all completions at once and to their full length. Neither uses an inference server; "
    "TRL can use vLLM. Tokens that end a completion are kept out in TRL by one of generate's processors of logits "
    "(suppress_tokens: an isin and a where for each token that is sampled), in PeRL by an index_fill. In bfloat16 both "
    "keep one autocast, and so one bfloat16 copy of the weights, for all of sampling; TRL alone would copy the weights "
    "again for each token.",
    "Pictures: TRL processes each picture twice for each completion, once to sample and once to train; PeRL once, and "
    "keeps it. Both use the same image processor.",
    "Head: TRL's fused head makes log-probs and entropies in tiles and computes the tiles again in the backward; on a "
    "CPU it scores every position, on a GPU those of completions alone. PeRL's makes loss and gradients in one pass "
    "over the scored positions.",
    "Softmax: PeRL leaves tokens that are never sampled out of it. Here it does not, as TRL cannot.",
    "Optimizer: AdamW in both, transformers' default (fused where PyTorch has that) in TRL, PyTorch's in PeRL.",
    "Advantages: both divide by the standard deviation within the ordered prompt, TRL adds 1e-4 to it, PeRL 1e-6.",
    "Micro-batches: of equally many tokens at most, padded in TRL, where their number of sequences also has to divide "
    "the step's. The budget is the same, what it holds is not: a step that fits one micro-batch of PeRL's may be several "
    "times the tokens in TRL, so the ratio of peak memory follows from the budget (see `micro-batch "
    "tokens`); --budget changes it.",
    "Attention: TRL's as --trl-attention says, PeRL's the first that runs here (see `packed attention`).",
    "Layers: both run transformers' own. Kernels for them that TRL can be told to use, Liger's (use_liger_kernel) or "
    "the hub's (use_kernels), are not used.",
    "Records: neither writes logs, checkpoints or completions; both compute the metrics that they would log.",
)
