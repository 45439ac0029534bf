"""Answers to many prompts at a time: a cache of many rows, continuous batching, likelihoods of
options.
With it evaluation is ten times as fast, and an answer can be shown token by token.
Without it: model.generate(prompts, max_new_tokens, eos_id), one prompt after the other, or --plain.

It calls model.hidden_states and model.logits as they are; its cache has the two names that
model.py's own has."""

import os
import sys

import torch
from torch.nn.utils.rnn import pad_sequence

from data import tasks
from extras.kernels import PLAIN_ATTEND
from extras.source import edited
from model import KVCache, Llama, check_prompts

# What `stream` and `log_likelihoods` stand for, as it was written; the method itself stands first.
# Where one of these has been edited, model.py's own methods answer.
CACHE = {(KVCache, "__init__"): "bb55c656be18", (KVCache, "update"): "82839ece389f"}
PLAIN = {(Llama, "generate"): "fba9f1ec7526"} | CACHE
LIKELIHOODS = {
    (Llama, "loss"): "84864ca6024f",
    (Llama, "logits"): "3238416f55cf",
    (tasks, "tokens_and_labels"): "063d6cbeab9d",
} | CACHE
LOG_LIKELIHOOD = "a7972f53f1d1"  # the fingerprint of eval.py's function of that name


def choose_engine(plain, score):
    """(this module, the names of the methods of model.py that it replaces). Where one of them has
    been edited it is (plain, []), and a line on the screen says so. plain: eval.py's OneByOne;
    score: "generate" or "likelihood"."""
    fingerprints = PLAIN
    instead = "answering with Llama.generate, one prompt after the other"
    if score == "likelihood":
        scripts_own = {(sys.modules[plain.__module__], "log_likelihood"): LOG_LIKELIHOOD}
        fingerprints = LIKELIHOODS | scripts_own
        instead = "asking Llama.loss, one option after the other"
    if is_edited(fingerprints, instead):
        return plain, []
    owner, name = next(iter(fingerprints))
    return sys.modules[__name__], [f"{owner.__name__}.{name}"]


def is_edited(fingerprints, instead):
    """Whether a method that this file stands for has been edited; then a line says what runs
    instead."""
    reason = edited(fingerprints)
    if reason:
        print(f"inference  {reason}: {instead}")
    return reason is not None


def generate(model, prompts, max_new_tokens, eos_id, batch_size=None, on_token=None):
    """What model.generate returns, `batch_size` prompts at a time (None: all). In float32 an answer
    does not depend on the others; in bfloat16 rounding, which depends on the batch's shape, may tip
    the choice between two alike tokens. on_token(i, ids) is called with the ids of answer i so far
    as each comes."""
    answers = dict(stream(model, prompts, max_new_tokens, eos_id, batch_size, on_token))
    return [answers[i] for i in range(len(prompts))]


@torch.inference_mode()
def stream(model, prompts, max_new_tokens, eos_id, batch_size=None, on_token=None):
    """What `generate` returns, each answer as it ends: yields (i, new ids of prompt i). The next
    prompts take the slots of those answered, so that a long answer does not keep the slots beside
    it empty."""
    check_prompts(prompts, max_new_tokens, model.config)
    if is_edited(PLAIN, "answering with Llama.generate, one prompt after the other"):
        for i, prompt in enumerate(prompts):
            yield i, model.generate([prompt], max_new_tokens, eos_id)[0]
        return
    if not prompts or max_new_tokens < 1:
        yield from ((i, []) for i in range(len(prompts)))
        return
    eos_ids = {eos_id} if isinstance(eos_id, int) else set(eos_id or ())
    answers = [[] for _ in prompts]
    num_slots = min(batch_size or len(prompts), len(prompts))
    cache = shared_prefix_cache(model, prompts, num_slots, max_new_tokens)
    # running[slot]: the prompt that this row of the cache belongs to
    waiting, running = list(range(len(prompts))), []
    x = torch.empty(0, model.config.hidden_size, device=model.device, dtype=model.dtype)
    while waiting or running:
        free = num_slots - len(running)
        # Several at a time: one alone is slow
        if waiting and free >= min(len(waiting), max(1, num_slots // 4)):
            new, waiting = waiting[:free], waiting[free:]
            x = torch.cat((x, prefill(model, [prompts[i] for i in new], cache, len(running))))
            running += new
        # [n] each; float: on a CPU this is slow in bfloat16
        highest, next_ids = model.logits(x).float().max(-1)
        if not highest.isfinite().all():
            raise FloatingPointError("the model's logits are not finite: try --dtype float32")
        unfinished = []
        for slot, (i, token) in enumerate(zip(running, next_ids.tolist())):
            if token not in eos_ids:
                answers[i].append(token)
                if on_token:
                    on_token(i, answers[i])
            if token in eos_ids or len(answers[i]) == max_new_tokens:
                yield i, answers[i]
            else:
                unfinished.append(slot)
        if len(unfinished) < len(running):
            slots = cache.keep(unfinished)
            running = [running[slot] for slot in slots]
            next_ids = next_ids[slots]
        x = model.hidden_states(next_ids[:, None], cache)[:, 0] if running else x[:0]


@torch.inference_mode()
def log_likelihoods(model, prompts, continuations):
    """Summed log-probability, in nats, of each of a prompt's continuations: continuations[i] is a
    list of lists of ids that may follow prompts[i], and so many numbers come back for it. A prompt
    is computed once for all of its own.

    Raises ValueError for a text beyond the model's context."""
    longest = max(
        len(prompt) + len(ids) for prompt, options in zip(prompts, continuations) for ids in options
    )
    if longest > model.config.context:
        raise ValueError(
            f"{longest} tokens are more than the model's context of {model.config.context}"
        )
    prompt_of = torch.tensor(
        [i for i, options in enumerate(continuations) for _ in options], device=model.device
    )  # [N]
    ids, lengths = pad([ids for options in continuations for ids in options])  # [N, T]
    ids, lengths = ids.to(model.device), lengths.to(model.device)
    cache = shared_prefix_cache(model, prompts, len(prompts), ids.shape[1])
    x = prefill(model, prompts, cache)
    cache.select(prompt_of)
    x = x[prompt_of, None]  # [N, 1, D]: what sees all before the first id
    if ids.shape[1] > 1:
        x = torch.cat((x, model.hidden_states(ids[:, :-1], cache)), 1)  # [N, T, D]
    totals = torch.zeros(len(ids), device=model.device)
    for t in range(ids.shape[1]):  # an id at a time: [N, V] logits in memory, not [N, T, V]
        log_probs = model.logits(x[:, t]).float().log_softmax(-1).gather(1, ids[:, t, None])[:, 0]
        totals += torch.where(t < lengths, log_probs, 0)
    totals = iter(totals.tolist())
    return [[next(totals) for _ in options] for options in continuations]


@torch.inference_mode()
def shared_prefix_cache(model, prompts, num_rows, room):
    """A cache of so many rows, each of which holds what all the prompts, lists of ids, begin with,
    computed once, and has space for the longest of them and `room` more positions."""
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    cache = BatchedCache(model, num_rows, longest + room)
    # commonprefix serves any sequences; of each prompt at least a token is left to be computed on
    # its own.
    prefix = min(len(os.path.commonprefix(prompts)), shortest - 1) if len(prompts) > 1 else 0
    if prefix:
        model.hidden_states(
            torch.tensor([prompts[0][:prefix]], device=model.device), cache.use(slice(0, 1))
        )
        for tensor in cache.keys + cache.values:
            tensor[1:, :, :prefix] = tensor[:1, :, :prefix]
    cache.prefix = prefix
    return cache


@torch.inference_mode()
def prefill(model, prompts, cache, first=0):
    """Prompts through the model into the rows of a `shared_prefix_cache` from `first` on; all rows
    so far come next. Returns the hidden state of each one's last token, [n, D]."""
    # On a CPU a few at a time: what one operation writes is still in the processor's cache when the
    # next one reads it.
    group = 8 if model.device.type == "cpu" else len(prompts)
    last = []
    for i in range(0, len(prompts), group):
        tokens, ends = pad([prompt[cache.prefix :] for prompt in prompts[i : i + group]])
        rows = slice(first + i, first + i + len(ends))
        cache.lengths[rows] = cache.prefix
        x = model.hidden_states(tokens.to(model.device), cache.use(rows))  # [n, T, D]
        last.append(x[torch.arange(len(x)), ends - 1])
        # Padding lies beyond: hidden, then overwritten
        cache.lengths[rows] = cache.prefix + ends.to(model.device)
    cache.use(slice(0, first + len(prompts)))
    return torch.cat(last)


def pad(rows):
    """Lists of ids as one LongTensor [B, T], padded on the right with 0, and their lengths [B]."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)
    return tokens, lengths


class BatchedCache:
    """Keys (rotated) and values of every layer for many rows, of which `lengths[row]` positions are
    filled. A forward pass concerns the rows that `use` was called with."""

    def __init__(self, model, num_rows, num_positions):
        config = model.config
        n, K, S, d = num_rows, config.num_key_value_heads, num_positions, config.head_dim

        # Not whatever memory held: a hidden position still meets its weight of 0, and 0 * nan is
        # nan.
        def zeros(*shape):
            return [
                torch.zeros(shape, device=model.device, dtype=model.dtype)
                for _ in model.model.layers
            ]

        # On a CPU keys lie in memory as [n, K, d, S]: so a few queries multiply them faster.
        on_cpu = model.device.type == "cpu"
        self.keys = (
            [keys.transpose(2, 3) for keys in zeros(n, K, d, S)] if on_cpu else zeros(n, K, S, d)
        )
        self.values = zeros(n, K, S, d)
        self.lengths = torch.zeros(num_rows, dtype=torch.long, device=model.device)
        self.prefix = 0  # so many positions are filled alike in every row
        # As KVCache's are, of which a reader's attend knows
        self.masks_are_bool = edited(PLAIN_ATTEND) is not None

    def use(self, rows):
        """Let the next tokens be those of these rows, a slice. Returns the cache."""
        self.rows = rows
        return self

    @property
    def length(self):
        return self.lengths[self.rows]  # [n]

    def update(self, layer, k, v):
        """As KVCache.update; the mask is [n, 1, T, S], S as far as any row reaches."""
        if layer == 0:
            self.locate(k.shape[2])
        self.keys[layer][self.index] = k.transpose(1, 2)
        self.values[layer][self.index] = v.transpose(1, 2)
        if layer == len(self.keys) - 1:
            self.lengths[self.rows] += k.shape[2]
        if self.mask is None:
            return k, v, None
        S = self.mask.shape[-1]
        return self.keys[layer][self.rows, :, :S], self.values[layer][self.rows, :, :S], self.mask

    def locate(self, T):
        """Once a forward pass, for all layers: where the T new tokens of each row go, and what they
        see."""
        device = self.lengths.device
        positions = self.length[:, None] + torch.arange(T, device=device)  # [n, T]
        self.index = (
            torch.arange(len(self.lengths), device=device)[self.rows, None],
            slice(None),
            positions,
        )
        S = int(positions.max()) + 1
        self.mask = None  # nothing lies before the tokens
        if S > T:
            seen = torch.arange(S, device=device) <= positions[..., None]  # [n, T, S]
            # Added to the scores, it need not be made a mask of numbers in every layer
            if not self.masks_are_bool:
                seen = torch.zeros(
                    seen.shape, device=device, dtype=self.keys[0].dtype
                ).masked_fill_(~seen, -torch.inf)
            self.mask = seen[:, None]

    def select(self, rows):
        """Let row i be what row rows[i] was; a row may be taken several times."""
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = tensor[rows]
        self.lengths = self.lengths[rows]
        self.use(slice(0, len(rows)))

    def keep(self, slots):
        """Drop all rows but `slots` (ascending). Returns the slot that each remaining row comes
        from: the last rows move into the holes, so that no more is copied than was dropped."""
        count = len(slots)
        movers = [slot for slot in slots if slot >= count]
        holes = sorted(set(range(count)) - set(slots))
        order = list(range(count))
        for hole, mover in zip(holes, movers):
            order[hole] = mover
        if holes:
            for tensor in self.keys + self.values:
                tensor[holes] = tensor[movers]
        self.lengths[:count] = self.lengths[order]
        self.use(slice(0, count))
        return order
