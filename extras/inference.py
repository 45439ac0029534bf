"""Answers to many prompts at a time: a cache of many rows, continuous batching, the likelihoods of
options.
With this file evaluation is five times as fast, and an answer can be shown token by token.
Without it: model.generate(prompts, max_new_tokens, eos_id), one prompt after the other, or --plain.

It calls model.hidden_states and model.logits, whatever they are. Its cache has the two names,
length and update, that the cache in model.py has."""

import os
import sys

import torch
from torch.nn.utils.rnn import pad_sequence

from data import tasks
from extras import kernels
from extras.kernels import PLAIN_LOSS
from extras.prefix import cache_of
from extras.source import edited
from model import KVCache, Llama, check_prompts

# `stream` stands for the first method of PLAIN, and `log_likelihoods` for the first of LIKELIHOODS;
# the other functions are those that they rely on. Where one of these has been edited, the methods
# of model.py answer.
CACHE = {(KVCache, "__init__"): "bb55c656be18", (KVCache, "update"): "82839ece389f"}
PLAIN = {(Llama, "generate"): "fba9f1ec7526"} | CACHE
LIKELIHOODS = PLAIN_LOSS | CACHE | {(tasks, "tokens_and_labels"): "063d6cbeab9d"}
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
    """The answers that model.generate returns, computed for `batch_size` prompts at a time, or for
    as many as there is memory for if it is None.

    In float32 an answer does not depend on the other prompts. In bfloat16 rounding depends on the
    shape of the batch, and may decide between two tokens of nearly the same probability.
    on_token(i, ids) is called after each new token, with the ids of answer i so far."""
    answers = dict(stream(model, prompts, max_new_tokens, eos_id, batch_size, on_token))
    return [answers[i] for i in range(len(prompts))]


@torch.inference_mode()
def stream(model, prompts, max_new_tokens, eos_id, batch_size=None, on_token=None):
    """Yield the answers of `generate` as they end, as (i, new ids of prompt i).

    A slot is a row of the cache, which holds one prompt and its answer. When an answer ends, the
    next prompt takes its slot, so that the slots beside a long answer do not stay empty."""
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
    if batch_size is None:
        batch_size = rows_at_a_time(model, max(map(len, prompts)) + max_new_tokens)
    num_slots = min(batch_size, len(prompts))
    cache = shared_prefix_cache(model, prompts, num_slots, max_new_tokens)
    waiting = list(range(len(prompts)))  # the numbers of the prompts that have no slot yet
    running = []  # running[slot]: the number of the prompt in this slot
    x = torch.empty(0, model.config.hidden_size, device=model.device, dtype=model.dtype)
    while waiting or running:
        free = num_slots - len(running)
        # Prompts are taken when a quarter of the slots is free, or when every prompt that waits
        # gets a slot, since one prompt alone is slow.
        if waiting and free >= min(len(waiting), max(1, num_slots // 4)):
            new = waiting[:free]
            waiting = waiting[free:]
            x = torch.cat((x, prefill(model, [prompts[i] for i in new], cache, len(running))))
            running += new
        highest, next_ids = model.logits(x).max(-1)  # both [n]
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


# Where the caller does not say how many prompts are answered at a time, they are as many as the
# cache has room for in this memory of a CPU, or in half of a GPU's free memory. More rows are
# faster, up to some hundred.
MEMORY_OF_CACHE = 2**31  # bytes
FEWEST_ROWS = 8
MOST_ROWS = 128


def rows_at_a_time(model, num_positions):
    """How many rows of `num_positions` a BatchedCache may have."""
    config = model.config
    keys = len(model.model.layers) * config.num_key_value_heads * config.head_dim * num_positions
    bytes_per_row = keys * (dtype_of_keys(model).itemsize + model.dtype.itemsize)
    memory = MEMORY_OF_CACHE
    if model.device.type == "cuda":
        memory = torch.cuda.mem_get_info(model.device)[0] // 2
    return min(max(memory // bytes_per_row, FEWEST_ROWS), MOST_ROWS)


def attends_by_kernel(model):
    """Whether the attention of all layers is that of extras/kernels.py."""
    methods = [getattr(layer.self_attn, "attend", None) for layer in model.model.layers]
    return all(getattr(method, "__func__", None) is kernels.attend for method in methods)


def dtype_of_keys(model):
    """On a CPU the kernel multiplies by the keys in float32. In the cache they are in float32 then,
    so that they need not be cast at every token."""
    by_kernel_on_cpu = model.device.type == "cpu" and attends_by_kernel(model)
    return torch.float32 if by_kernel_on_cpu else model.dtype


@torch.inference_mode()
def log_likelihoods(model, prompts, continuations):
    """The log-probabilities of continuations, in nats, each summed over the continuation's ids.

    continuations[i] is a list of the continuations of prompts[i], each a list of ids. The result
    has a number in the place of each continuation. A prompt is computed once, for all its
    continuations. Raises ValueError for a text that is longer than the model's context."""
    flat = []  # the continuations of all prompts, one after the other
    numbers = []  # for each of these the number of its prompt
    text_lengths = []  # for each of these the number of its tokens and those of its prompt
    for i, options in enumerate(continuations):
        for ids in options:
            flat.append(ids)
            numbers.append(i)
            text_lengths.append(len(prompts[i]) + len(ids))
    longest = max(text_lengths)
    if longest > model.config.context:
        raise ValueError(
            f"{longest} tokens are more than the model's context of {model.config.context}"
        )
    prompt_of = torch.tensor(numbers, device=model.device)  # [N]
    ids, lengths = pad(flat)  # [N, T], [N]
    ids = ids.to(model.device)
    lengths = lengths.to(model.device)
    cache = shared_prefix_cache(model, prompts, len(prompts), ids.shape[1])
    x = prefill(model, prompts, cache)
    cache.select(prompt_of)
    x = x[prompt_of, None]  # [N, 1, D]: the states that predict the first id
    if ids.shape[1] > 1:
        x = torch.cat((x, model.hidden_states(ids[:, :-1], cache)), 1)  # [N, T, D]
    totals = torch.zeros(len(ids), device=model.device)
    # One position at a time, so that the logits in memory are [N, V] and not [N, T, V].
    for t in range(ids.shape[1]):
        log_probs = model.logits(x[:, t]).float().log_softmax(-1).gather(1, ids[:, t, None])[:, 0]
        totals += torch.where(t < lengths, log_probs, 0)
    results = [[] for _ in continuations]
    for i, total in zip(numbers, totals.tolist()):
        results[i].append(total)
    return results


@torch.inference_mode()
def shared_prefix_cache(model, prompts, num_rows, room):
    """A cache of `num_rows` rows, each with space for the longest prompt and `room` more positions.
    Every row holds the ids that all prompts begin with, which are computed once."""
    shortest = min(map(len, prompts))
    longest = max(map(len, prompts))
    cache = BatchedCache(model, num_rows, longest + room)
    prefix = 0
    if len(prompts) > 1:
        # commonprefix is for paths, and takes any lists. At least one token of each prompt is not
        # shared, so that the prompt's last state is computed.
        prefix = min(len(os.path.commonprefix(prompts)), shortest - 1)
    if prefix:
        shared = cache_of(model, torch.tensor([prompts[0][:prefix]], device=model.device))
        for rows, row in zip(cache.keys + cache.values, shared.keys + shared.values):
            rows[:, :, :prefix] = row
    cache.prefix = prefix
    return cache


@torch.inference_mode()
def prefill(model, prompts, cache, first=0):
    """Compute prompts, and fill the rows of a `shared_prefix_cache` from `first` on with them. Then
    let the cache use all rows that are filled. Returns the hidden states of the prompts' last
    tokens, [n, D]."""
    # On a CPU a few prompts are computed at a time, since the numbers that one operation writes are
    # then still in the processor's cache when the next operation reads them.
    group = 8 if model.device.type == "cpu" else len(prompts)
    last = []
    for i in range(0, len(prompts), group):
        tokens, ends = pad([prompt[cache.prefix :] for prompt in prompts[i : i + group]])
        rows = slice(first + i, first + i + len(ends))
        cache.lengths[rows] = cache.prefix
        x = model.hidden_states(tokens.to(model.device), cache.use(rows))  # [n, T, D]
        last.append(x[torch.arange(len(x)), ends - 1])
        # The padding lies behind these lengths: it is hidden, and then overwritten.
        cache.lengths[rows] = cache.prefix + ends.to(model.device)
    cache.use(slice(0, first + len(prompts)))
    return torch.cat(last)


def pad(rows):
    """Lists of ids as one LongTensor [B, T], padded with 0 on the right, and their lengths [B]."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)
    return tokens, lengths


class BatchedCache:
    """The rotated keys and the values of every layer, for many rows. In a row `lengths[row]`
    positions are filled. A forward pass reads and fills the rows that `use` was called with."""

    def __init__(self, model, num_rows, num_positions):
        config = model.config
        K = config.num_key_value_heads
        d = config.head_dim

        def zeros(shape, dtype):
            """A tensor for each layer. It must not hold nan, since a hidden value is multiplied by
            a weight of 0, and 0 * nan is nan."""
            layers = model.model.layers
            return [torch.zeros(shape, device=model.device, dtype=dtype) for _ in layers]

        self.values = zeros((num_rows, K, num_positions, d), model.dtype)
        if model.device.type == "cpu":
            # In memory keys are [rows, K, d, positions]: a CPU multiplies a few queries by them
            # faster.
            transposed = zeros((num_rows, K, d, num_positions), dtype_of_keys(model))
            self.keys = [keys.transpose(2, 3) for keys in transposed]
        else:
            self.keys = zeros((num_rows, K, num_positions, d), model.dtype)
        self.lengths = torch.zeros(num_rows, dtype=torch.long, device=model.device)
        self.prefix = 0  # the number of positions that hold the same ids in every row
        # The kernel adds a mask of numbers to the scores. Any other Attention.attend, an edited one
        # perhaps, gets masks of the dtype that the masks of KVCache have.
        self.masks_are_bool = not attends_by_kernel(model)

    def use(self, rows):
        """Let the next forward passes read and fill these rows, a slice. Returns the cache."""
        self.rows = rows
        return self

    @property
    def length(self):
        return self.lengths[self.rows, None]  # [n, 1]

    def update(self, layer, k, v):
        """KVCache.update for many rows. The mask is [n, 1, T, S]: the longest row has S filled
        positions, those of the new tokens included."""
        if layer == 0:
            self.locate(k.shape[2])
        keys = self.keys[layer]
        keys[self.index] = k.transpose(1, 2).to(keys.dtype)
        self.values[layer][self.index] = v.transpose(1, 2)
        if layer == len(self.keys) - 1:
            self.lengths[self.rows] += k.shape[2]
        if self.mask is None:
            return k, v, None
        S = self.mask.shape[-1]
        return keys[self.rows, :, :S], self.values[layer][self.rows, :, :S], self.mask

    def locate(self, T):
        """Set the positions of the T new tokens of each row, and the mask of what they see. This is
        done once in a forward pass, for all layers."""
        device = self.lengths.device
        positions = self.length + torch.arange(T, device=device)  # [n, T]
        self.index = (
            torch.arange(len(self.lengths), device=device)[self.rows, None],
            slice(None),
            positions,
        )
        S = int(positions.max()) + 1
        self.mask = None  # right if nothing lies before the tokens
        if S > T:
            seen = torch.arange(S, device=device) <= positions[..., None]  # [n, T, S]
            # A mask of numbers is made here once, since the kernel adds it to the scores in every
            # layer.
            if not self.masks_are_bool:
                numbers = torch.zeros(seen.shape, device=device, dtype=self.values[0].dtype)
                seen = numbers.masked_fill_(~seen, -torch.inf)
            self.mask = seen[:, None]

    def select(self, rows):
        """Put row rows[i] in the place of row i, for all i at once. The same row may be taken more
        than once."""
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = tensor[rows]
        self.lengths = self.lengths[rows]
        self.use(slice(0, len(rows)))

    def keep(self, slots):
        """Drop all rows but `slots`, which are in ascending order. The last rows move into the
        holes, so that no more rows are copied than were dropped. Returns for each row the slot in
        which it was before."""
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
