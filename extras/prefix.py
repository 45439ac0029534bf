"""What all examples of a batch begin with, the frame of the prompt above all, is computed once.
Of the tokens of commonsense questions that is a third; gradients and losses are the same.
Without it: model.loss computes every example from its first token on.

Attention sees the tokens before it through a cache, and a gradient flows through what is in the
cache like through anything else. So one row of the shared tokens fills a cache, and the examples'
own tokens follow it."""

import sys

from extras.distributed import is_first
from extras.source import edited
from model import DecoderLayer, KVCache, Llama

# What decides how a token depends on others and on its position. Where it has been edited nothing
# is shared: the edit may not know of a cache. (Attention.forward has `cache.update` in it.)
PLAIN = {
    (Llama, "hidden_states"): "d6d8016dae55",
    (sys.modules[Llama.__module__], "rope_table"): "a62bca400352",
    (DecoderLayer, "forward"): "0f1b6aaf05b7",
    (KVCache, "__init__"): "bb55c656be18",
    (KVCache, "update"): "82839ece389f",
}
WORTH_IT = 64  # tokens: two passes cost more than one, and where fewer are saved it does not pay


def share_if_possible(model):
    """Let the loss of extras/kernels.py share what the rows of a batch begin with, where that
    changes no result; else a line says why not."""
    model.shares_prefix = True
    for method, fingerprint in PLAIN.items():
        if edited({method: fingerprint}):
            owner, name = method
            stop_sharing(model, f"{owner.__name__}.{name} is no longer as it was written")
    if any(drops(module) for module in model.modules()):
        stop_sharing(model, "dropout is drawn for each example")


def drops(module):
    return "Dropout" in type(module).__name__ and getattr(module, "p", 0) > 0


def stop_sharing(model, reason):
    """Compute every example from its first token on, and print a line that says why."""
    if getattr(model, "shares_prefix", False) and is_first():
        print(f"prefix     {reason}: what all examples begin with is computed for each of them")
    model.shares_prefix = False


def shared_length(tokens, stop):
    """How many ids all rows of tokens [B, T] begin with. stop: bool [T], true from where on nothing
    may be shared."""
    same = (tokens == tokens[:1]).all(0) & ~stop
    return min(int(same.cumprod(0).sum()), len(same) - 1)


def hidden_states(model, tokens, wanted):
    """model.hidden_states(tokens)[wanted]: [B, T], bool [B, T] -> [N, D]. What all rows begin with,
    up to the first position that is wanted, is computed for one row."""
    B = len(tokens)
    shared = shared_length(tokens, wanted.any(0)) if model.shares_prefix and B > 1 else 0
    if shared * (B - 1) < WORTH_IT:
        return model.hidden_states(tokens)[wanted]
    cache = cache_of(model, tokens[:1, :shared])
    cache.keys = [keys.expand(B, -1, -1, -1) for keys in cache.keys]
    cache.values = [values.expand(B, -1, -1, -1) for values in cache.values]
    return model.hidden_states(tokens[:, shared:], cache)[wanted[:, shared:]]


def cache_of(model, tokens):
    """A cache that holds the keys and values of tokens [1, S], which may be expanded or copied to
    all rows that begin with these tokens."""
    cache = KVCache(model.config)
    model.hidden_states(tokens, cache)
    return cache
