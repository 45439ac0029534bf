"""Exercise 5: DLS, which layers train.

Dynamic Layer Selection trains, at any time, only the layers that matter now. Every so many steps a step is a probe:
each layer's two norm weights (before attention, before the MLP) ask for gradients, and the layers where these are
largest train until the next probe. Norm weights are few, and all that attention and MLP read passes through them.

1. Scores. A step consists of micro-batches, each with its loss and its backward pass. PyTorch adds up gradients:

    loss 1 .backward()      .grad = g1
    loss 2 .backward()      .grad = g1 + g2
    loss 3 .backward()      .grad = g1 + g2 + g3      <- the gradient of the step: read it here, once

   A layer's score is the L2 norm of the gradients of its two norm weights taken together, as if they were one long
   vector:

    score = sqrt(sum over both weights of grad ** 2)

   This is not the sum of two norms: gradients [3] and [4] give 5, not 7. The norms of g1, g2, g3 added up would not do
   either: gradients that point in opposite directions cancel in the step, and so they must in the score. Start from
   .grad = None, or the gradients of the previous probe are still in there.

2. Selection. Of L layers, those with the highest scores; their indices in ascending order.

    count = max(1, round(k_ratio * L))        L = 5, k_ratio = 0.4, scores [2, 9, 1, 7, 3]  ->  [1, 3]

3. Activation. What trains in each layer is a list of parameters. In the selected layers requires_grad is True; in the
   others it is False and .grad is None, because an optimizer would apply a gradient that was left there. Selected
   layers keep the gradient that they have: the probe is a training step too. A layer that rested may train again.

To do: the three functions below. `weight.grad.norm()` is an L2 norm; torch.stack([a, b]).norm() that of two of them.
To avoid: .grad.sum() or .abs().sum(); sorted(scores)[:count], which are the lowest, and no indices.

Run: python -m pytest extras/lesson/exercises -q -k ex5      (pip install pytest, if it is not there)
"""

import torch  # noqa: F401 - for your code


def layer_scores(losses, norms):
    """losses: a scalar for each micro-batch of the step, on which no backward pass was made yet; norms: a pair of norm
    weights (nn.Parameter) for each layer. Makes the backward passes, returns the scores, [L]."""
    raise NotImplementedError("exercise 5: backward, then the norms of .grad; see 1 in the text")


def select_layers(scores, k_ratio):
    """scores [L] -> the indices of the layers that train, a list of int in ascending order."""
    raise NotImplementedError("exercise 5: indices of the highest scores; see 2 in the text")


def activate(parameters, active):
    """parameters: for each layer, the list of its parameters; active: indices of the layers that train."""
    raise NotImplementedError("exercise 5: requires_grad and .grad; see 3 in the text")
