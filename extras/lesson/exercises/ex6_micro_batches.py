"""Exercise 6: a step in micro-batches that is the step of the whole batch.

A batch that does not fit into memory goes through the model in parts, the micro-batches. Their gradients add up in
.grad, and the step must come out as if the batch had been computed at once, whatever the size of the parts.

1. An example is (prompt ids, response ids). The model predicts at each position the token that comes next, and is
   trained on the response alone. So the labels are the ids shifted by one, and -100 where there is nothing to learn:
   in the prompt, and in the padding on the right, which makes the rows of a batch equally long.

    prompt [5, 6, 7], response [8, 9]; beside it a shorter one, prompt [5], response [3]

    tokens    5     6     7     8              5     0     0     0        the last id is never an input
    labels   -100  -100   8     9              3   -100  -100  -100       what follows each token
                          ^ the prompt's last token predicts the response's first

   tokens and labels are [B, T], LongTensors, with T = the longest example's length - 1. Pad tokens with 0: attention
   looks back only, so that what stands to the right of a response does not reach it.

2. The loss of the batch is the mean over its N response tokens, N = all labels of all micro-batches that are not -100:

    loss = (sum of the token losses of micro-batch 1) / N  +  (sum ... of micro-batch 2) / N  +  ...

   Each summand is one forward and one backward pass. Micro-batches have different numbers of response tokens: the mean
   of each one's mean would give a token more weight where it has less company. With 1 token of loss 4 and 3 of loss 2:

    (4 + 2 + 2 + 2) / 4 = 2.5, but the mean of the means is (4 + 2) / 2 = 3

To do: the two functions below. model(tokens) gives logits [B, T, V]. F.cross_entropy(logits.flatten(0, 1),
labels.flatten(), reduction="sum") is the sum of the token losses: it leaves out labels of -100 by itself.
To avoid: reduction="mean" (the micro-batch's own mean; without any response token it is 0/0); dividing by the number
of micro-batches or by B * T; zero_grad between the passes, which throws away what was added up; keeping the losses,
with all activations, for one backward pass at the end; an optimizer's step, which is the caller's business.

Run: python -m pytest extras/lesson/exercises -q -k ex6      (pip install pytest, if it is not there)
"""

import torch  # noqa: F401 - for your code
import torch.nn.functional as F  # noqa: F401 - for your code


def collate(examples):
    """Pairs (prompt ids, response ids), lists of int -> tokens [B, T], labels [B, T]."""
    raise NotImplementedError("exercise 6: labels, shifted by one; see 1 in the text")


def accumulate_gradients(model, micro_batches):
    """micro_batches: a list of (tokens, labels). Leaves the batch's gradients in .grad; returns its loss, a float."""
    raise NotImplementedError("exercise 6: sum of the losses over N; see 2 in the text")
