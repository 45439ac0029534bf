"""Exercise 7: your RoSA trains tiny.                                          About 30 minutes.

Until here each part was tested alone. Now your parts run together. The test loads the bundled
model, data/tiny, puts your RoPE into it (exercise 1), and lets your code train it for sixty steps
on the toy task. Then it merges your adapters (exercise 4) and asks the model some questions.

1. attach. First freeze the whole model. Then wrap q_proj and k_proj of every layer in a RoAE of
   exercise 3. The order matters: a RoAE that is there already would be frozen with the rest.

    model                                              after attach
      model.model.layers[i].self_attn.q_proj  Linear     RoAE(Linear), A and B train
      model.model.layers[i].self_attn.k_proj  Linear     RoAE(Linear), A and B train
      everything else                                    frozen

   Keys have fewer heads than queries in many models: one head of K serves several heads of Q. This
   is grouped-query attention. tiny has 6 heads of Q and 2 of K. Every head, of Q or of K, has
   model.config.head_dim dimensions. A RoAE of Q therefore has more rows in B than one of K. With
   D = hidden_size, d = head_dim and n = max(1, round(low_freq_ratio * d / 2)) pairs a head, so many
   numbers train in a layer:

    q_proj    rank * D + H * 2n * rank           H = num_attention_heads
    k_proj    rank * D + K * 2n * rank           K = num_key_value_heads

2. train. Before the first step make two things, once:

    the LayerSelector of exercise 5: it remembers scores from probe to probe, and it lists what can
       train at the moment when it is made;
    torch.optim.AdamW over the A and B of all layers, with weight_decay=0. AdamW keeps two moments
       for each number, so a new optimizer at every step would have forgotten them. It skips
       parameters without a gradient: so it may hold the layers that rest, and it must, because
       they train again later. It must not hold the norms, which only measure.

   Then every step does this, in this order:

    learning rate         learning_rate(step) into the "lr" of every optimizer.param_groups
    before_forward(step)  at a probe all layers and the norms get requires_grad
    micro-batches         the step's examples, cut into parts of micro_batch_size; the last part
                          may be smaller. collate makes (tokens, labels) of each part.
    accumulate_gradients  one call with all parts: it divides by the response tokens of all of them
    after_backward()      at a probe: scores, selection, and the others lose their gradient
    optimizer.step()      updates the layers that were selected
    zero_grad             or the next step's gradients are added to these

   Gradients are not clipped here; train.py does that too.

To do: the two functions below, about thirty lines together. linear.out_features // head_dim is the
number of heads of any projection. model.set_submodule(name, module) puts a module in the place of
another; so does setattr on its parent. `parts = [batch[i : i + n] for i in ...]` cuts a list.
To avoid: a copy of the model or of a linear layer; Q's number of heads for K; optimizer or
LayerSelector made inside the loop; batches[0] at every step.
First: exercises 1 to 6. The test of this one runs their tests before anything else. While one of
them is red, it says which exercise that is, and no more.
When it is green, it prints what your RoSA has done: the loss before and after, the layers selected
at each probe, and what the model answers to a question before, after, and when it is merged.
It works if the held-out loss falls from about 2.7 to below 0.3: yours should come near 0.1.

Run: python -m pytest extras/lesson/exercises -q -k ex7     (pip install pytest, if it is not there)
"""

import torch  # noqa: F401 - for your code
from ex3_roae import RoAE  # noqa: F401 - for your code
from ex5_layers import LayerSelector  # noqa: F401 - for your code
from ex6_micro_batches import accumulate_gradients, collate  # noqa: F401 - for your code


def attach(model, rank, alpha, low_freq_ratio):
    """Freeze the model, wrap q_proj and k_proj of every layer. Returns this same model."""
    raise NotImplementedError("exercise 7: freeze, then wrap q_proj and k_proj; see 1")


def train(model, batches, learning_rate, k_ratio=0.5, select_every=10, micro_batch_size=2):
    """Train what `attach` has added. batches: for each step its examples (prompt ids, response
    ids); learning_rate: a function, step -> float. Returns the loss of each step, floats."""
    raise NotImplementedError("exercise 7: a step for each batch; see 2")
