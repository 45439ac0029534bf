"""Figure 1 of the paper: how large Q and K are in each dimension of a head, layer by layer.
It shows, for any model, whether the slow pairs that RoAE adapts are the large ones.
Without it: a forward hook on q_proj and k_proj, and a norm over the tokens.

    python -m extras.figure1 figure1.png --ckpt tiny --task toy
"""

import inspect
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import rosa
from data import tasks
from data.errors import UserError, user_file
from data.tokenizer import load_tokenizer
from extras import adapters, checkpoints
from extras.checkpoints import (
    choose_device_and_dtype,
    find_checkpoint,
    load_model,
    say_if_bfloat16_is_slow,
)
from extras.commands import add_model_arguments, command_parser, count, run_script


def load_prompts(args, tokenizer):
    """The ids of the prompts of the first --limit test examples of a task."""
    prompts = []
    for name in tasks.test_sets(args.task):
        for _, example in tasks.test_examples(name, args.data_dir) or ():
            prompts.append(tasks.encode_prompt(example, tokenizer))
            if len(prompts) == args.limit:
                return prompts
    if not prompts:
        raise UserError(
            f"{args.data_dir} has no test set of {args.task}. To get them: "
            f"{tasks.how_to_get(args.data_dir)}"
        )
    return prompts


@torch.inference_mode()
def mean_norms(model, prompts):
    """How large each dimension of a head is before the rotation, as {"q": [L, d], "k": [L, d]}: the
    L2 norm over the tokens of a prompt, averaged over prompts and heads."""
    norms = {"q": [], "k": []}  # the norms [d] of each layer, for one prompt after the other

    def record(name):
        """A hook that adds the norms of a projection's output to norms[name]."""

        def hook(module, inputs, states):  # [1, T, heads * d]
            heads = states[0].float().unflatten(-1, (-1, model.config.head_dim))  # [T, heads, d]
            norms[name].append(heads.norm(dim=0).mean(0).cpu())

        return hook

    hooks = []
    for layer in model.model.layers:
        hooks.append(layer.self_attn.q_proj.register_forward_hook(record("q")))
        hooks.append(layer.self_attn.k_proj.register_forward_hook(record("k")))
    for prompt in tqdm(prompts, unit="example", leave=False):
        model.hidden_states(torch.tensor([prompt], device=model.device))
    for hook in hooks:
        hook.remove()
    means = {}
    for name in norms:
        by_prompt = torch.stack(norms[name]).unflatten(0, (len(prompts), -1))  # [prompts, L, d]
        means[name] = by_prompt.mean(0).numpy()
    return means


def first_low_frequency_pair(model):
    """The first of the low-frequency pairs, by the low_freq_ratio of the model's adapter, or else
    the default one."""
    ratio = inspect.signature(rosa.attach).parameters["low_freq_ratio"].default
    if rosa.adapters(model):
        ratio = rosa.attach_arguments(model)["low_freq_ratio"]
    return int(rosa.adapted_rows(model.config.head_dim, 1, ratio).min())


def draw(path, means, first_low, count):
    """Draw the figure, if the package matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print(f"{path} needs the package matplotlib: pip install matplotlib")
        return
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (name, mean) in zip(figure.subplots(1, 2), means.items()):
        half = mean.shape[1] // 2
        image = axes.imshow(
            mean, origin="lower", aspect="auto", cmap="magma", vmax=np.percentile(mean, 99.5)
        )
        # The two bands of low-frequency dimensions end with the two halves of a head.
        for end in (half, 2 * half):
            left = end - half + first_low
            frame = {"fill": False, "edgecolor": "cyan", "linewidth": 1.5}
            axes.axvspan(left - 0.5, end - 0.5, **frame)
        axes.set(
            xlabel="head dimension (i and i + d/2 are a RoPE pair; low frequencies framed)",
            ylabel="layer",
            title=f"{name.upper()}: L2 norm, mean over heads and {count} prompts",
        )
        figure.colorbar(image, extend="max")
    with user_file(path):
        figure.savefig(path, dpi=100)
    print(f"figure     {path}")


def main(args):
    """Print the norms of Q by quarters of the pairs, write the norms of Q and K, [L, d] each, into
    an .npz file beside the picture, and draw the picture."""
    ckpt = find_checkpoint(args.ckpt)
    device, dtype = choose_device_and_dtype(args.device, args.dtype)
    prompts = load_prompts(args, load_tokenizer(ckpt))
    model = load_model(ckpt, device, dtype, quantization=args.quantize)
    longest = max(map(len, prompts))
    if longest > model.config.context:
        raise UserError(
            f"{args.task}: a prompt has {longest} tokens, more than the model's context of "
            f"{model.config.context}"
        )
    if args.adapter:
        adapters.load_adapter(model, args.adapter)
    checkpoints.check_finite(model)
    say_if_bfloat16_is_slow(device, dtype)
    means = mean_norms(model, prompts)
    first_low = first_low_frequency_pair(model)
    half = model.config.head_dim // 2
    norms_of_pairs = np.sqrt(means["q"][:, :half] ** 2 + means["q"][:, half:] ** 2)  # [L, d/2]
    quarters = np.array_split(norms_of_pairs.mean(0), 4)
    shown = ", ".join(f"{part.mean():.1f}" for part in quarters)
    print(f"mean norm of Q by quarter of the pairs, high to low frequency: {shown}")
    numbers = args.png.with_suffix(".npz")
    with user_file(args.png):
        args.png.parent.mkdir(parents=True, exist_ok=True)
        np.savez(numbers, first_low_frequency_pair=first_low, **means)
    print(f"numbers    {numbers}")
    draw(args.png, means, first_low, len(prompts))


def parse_args(arguments=None):
    parser = command_parser("figure1", __doc__)
    parser.add_argument("png", type=Path, metavar="PNG", help="the picture to draw")
    add_model_arguments(parser)
    parser.add_argument(
        "--task", default="toy", help="whose test examples are the prompts (default: toy)"
    )
    parser.add_argument("--limit", type=count, default=8, help="how many of them (default: 8)")
    parser.add_argument(
        "--data-dir",
        default=tasks.DATA_DIR,
        help=f"directory laid out as LLM-Adapters' repository (default: {tasks.DATA_DIR})",
    )
    return parser.parse_args(arguments)


def run(arguments=None):
    run_script("figure1", parse_args, main, arguments)


if __name__ == "__main__":
    run()
