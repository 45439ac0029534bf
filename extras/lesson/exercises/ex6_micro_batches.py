"""Exercise 6: a step in micro-batches that is the step of the whole batch. About 20 minutes.

You write `collate` of train.py, and the inner loop of its training step.

A batch that does not fit into memory goes through the model in parts, the micro-batches. Their
gradients add up in .grad. The step must come out as if the batch had been computed at once,
whatever the size of the parts.

1. An example is (prompt ids, response ids), two lists of whole numbers. The model predicts at each
   position the token that comes next, and is trained on the response alone. So the labels are the
   ids shifted by one. They are -100 where there is nothing to learn: in the prompt, and in the
   padding on the right, which makes the rows of a batch equally long.

    prompt [5, 6, 7], response [8, 9]; beside it a shorter one, prompt [5], response [3]

    tokens    5     6     7     8              5     0     0     0        the last id is no input
    labels   -100  -100   8     9              3   -100  -100  -100       what follows each token
                          ^ the prompt's last token predicts the response's first

   tokens and labels are [B, T], LongTensors on the device. T is the longest example's length - 1.
   Pad tokens with 0, which is also the id of a token that a response may hold. Attention looks back
   only, so what stands to the right of a response does not reach it. Any id may stand there, also
   the last one of a shorter example. No end-of-sequence token is added. The lists of the examples
   stay what they are, since the next epoch uses them again.

2. The loss of the batch is the mean over its N response tokens. N counts all labels of all
   micro-batches that are not -100:

    loss = (sum of the token losses of micro-batch 1) / N  +  (sum ... of micro-batch 2) / N  +  ...

   The labels of collate are shifted already, so the loss does not shift them again. The caller has
   cleared .grad before the first pass.

   Each summand is one forward and one backward pass, before the next forward pass. So the memory
   holds the activations of one micro-batch only. That is what micro-batches are for.

   Micro-batches have different numbers of response tokens. The mean of each one's mean would give a
   token more weight where there are few. With 1 token of loss 4, and 3 tokens of loss 2:

    (4 + 2 + 2 + 2) / 4 = 2.5, but the mean of the means is (4 + 2) / 2 = 3

To do: the two functions below. model(tokens) gives logits [B, T, V].
F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") is the sum of the token
losses. It leaves out labels of -100 by itself. loss.item() is the number in a loss, as a float.

To avoid:
- reduction="mean", which is the micro-batch's own mean; without any response token it is 0/0.
- Dividing by the number of micro-batches, or by B * T.
- zero_grad between the passes, which throws away what was added up.
- Keeping the losses, with all activations, for one backward pass at the end.
- An optimizer's step, which is the caller's business.

Run: python -m pytest extras/lesson/exercises -q -k ex6      (pip install pytest, if it is missing)
"""

import torch  # noqa: F401 - for your code
import torch.nn.functional as F  # noqa: F401 - for your code


def collate(examples, device="cpu"):
    """Pairs (prompt ids, response ids), lists of int -> tokens [B, T], labels [B, T]."""
    raise NotImplementedError("exercise 6: tokens, and labels shifted by one; see 1")


def accumulate_gradients(model, micro_batches):
    """micro_batches: a list of (tokens, labels). Leaves the batch's gradients in .grad, and returns
    the batch's loss, a float."""
    raise NotImplementedError("exercise 6: sum of the losses over N; see 2 in the text")
