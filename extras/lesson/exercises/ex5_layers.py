"""Exercise 5: DLS, which layers train. About 40 minutes.

You write `gradient_norm` and the class `LayerSelector` of rosa.py, without its ablations.

Dynamic Layer Selection trains, at any time, only the layers that matter now. Every `select_every`
steps, step 0 included, a step is a probe: all layers get gradients, and the layers with the highest
scores train until the next probe. A training loop calls the selector in this order:

    selector.before_forward(step)        at a probe: adapters and norms get requires_grad
    for each micro-batch:
        loss.backward()                  PyTorch adds up the gradients in .grad
    selector.after_backward()            at a probe: scores, selects, freezes
    optimizer.step()                     the probe is a training step too, of the selected layers

With four layers, k_ratio = 0.5 and select_every = 3:

    step                  0       1       2       3       4       5       6
                          probe                   probe                   probe
    have requires_grad    ████    █··█    █··█    ████    ██··    ██··    ████
    are updated           █··█    █··█    █··█    ██··    ██··    ██··    ·██·
    highest scores        0, 3                    0, 1                    1, 2

1. Scores. A layer's score is the L2 norm of the gradients of its two norm weights, taken together
   as if they were one long vector. Norm weights are few, and all that attention and MLP read passes
   through them.

    score = sqrt(sum over both weights of grad ** 2)        gradients [3] and [4]  ->  5

   This is not the sum of two norms, which would be 7. It is made in float32, also if the gradients
   are bfloat16. After the last micro-batch .grad is the gradient of the step, so it is read there,
   once. Norms of single micro-batches, added up, would not do: gradients that point in opposite
   directions cancel in the step, and so they must in the score.

2. How many. Of L layers `count` train at a time:

    count = max(1, round(k_ratio * L))        L = 5, k_ratio = 0.4  ->  2

   The layers with the highest scores are selected: with the scores [2, 9, 1, 7, 3] the layers
   [1, 3]. `active` holds their indices, in ascending order.

3. Activation. What trains in a layer are the parameters that had requires_grad when the selector
   was made: the adapters. `self.parameters` holds them, a list for each layer. In the active layers
   they have requires_grad. In the others they have not, and their .grad is None, because an
   optimizer would apply a gradient that was left there. The active layers keep the gradients that
   they have. A layer that rested may be active again. Other weights of a layer never get
   requires_grad.

4. The norm weights only measure. They have requires_grad at a probe, from before_forward to
   after_backward. After that they have not, and their .grad is None: else an optimizer would move
   them, and the next probe would add to what is left from this one. `self.norms` holds the two
   weights of each layer.

5. At a step that is no probe before_forward sets `probing` to False, and after_backward does
   nothing.

Given: what LayerSelector reads of the model. model.model.layers are the layers, each with the
modules input_layernorm and post_attention_layernorm. All weights but the adapters are frozen when
the selector is made. Before the first probe all layers are active.

To do: `gradient_norm`, self.count, and three methods. after_backward sets `scores`, a tensor [L],
and calls activate with the layers that it has selected. before_forward of a probe calls activate
with all layers. Useful: torch.cat, Tensor.norm, Tensor.argsort.

To avoid: .grad.sum() or .abs().sum(); sorted(scores)[:count], which are the lowest, and no indices;
layer.requires_grad_(True), which wakes all the weights of the layer.

Run: python -m pytest extras/lesson/exercises -q -k ex5      (pip install pytest, if it is missing)
"""

import torch  # noqa: F401 - for your code


def gradient_norm(weights):
    """The L2 norm of the gradients of these weights, taken together: a float32 tensor without
    dimensions, or a float."""
    raise NotImplementedError("exercise 5: one norm of all .grad; see 1 in the text")


class LayerSelector:
    """Selects the layers that train. Attributes: probing, whether this step is a probe; active, the
    layers that train, ascending; scores, those of the last probe."""

    def __init__(self, model, k_ratio=0.5, select_every=25):
        self.select_every = select_every
        self.parameters = []  # of each layer: the parameters that can train
        self.norms = []  # of each layer: its two norm weights
        for layer in model.model.layers:
            self.parameters.append([p for p in layer.parameters() if p.requires_grad])
            first, second = layer.input_layernorm, layer.post_attention_layernorm
            self.norms.append([first.weight, second.weight])
        self.probing = False
        self.scores = None  # a score for each layer, once there was a probe
        self.active = list(range(len(self.parameters)))
        # self.count = ...  how many layers train at a time
        raise NotImplementedError("exercise 5: self.count; see 2 in the text")

    def before_forward(self, step):
        """Call before the first forward pass of step `step`, counted from 0."""
        raise NotImplementedError("exercise 5: is it a probe? what does one need? 4 and 5")

    def after_backward(self):
        """Call after the last backward pass of the step, before the optimizer's step."""
        raise NotImplementedError("exercise 5: scores, selection, the norms; see 1 to 4")

    def activate(self, layers):
        """Let the parameters of these layers train, and no others; see 3 in the text."""
        raise NotImplementedError("exercise 5: requires_grad and .grad; see 3 in the text")
