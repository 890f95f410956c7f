r"""DAS: in which subspace of which hidden vector does a model keep a causal variable?

Aim: distributed alignment search (Geiger et al. 2023, https://arxiv.org/abs/2303.02536), where
LoReFT comes from. Run a model on a *base* and on a *source* prompt, give the base run the source's
value in a subspace of one hidden vector, b + Rᵀ(Rs − Rb), and learn R so that the answer is the one
that a causal model of the task gives when one of its variables is exchanged. How often it is, on
held-out pairs, is the interchange-intervention accuracy (IIA).

``planted``: a small Llama whose weights keep a variable of eight values in a random subspace of
four dimensions, exactly, and nowhere else. DAS must find it: IIA beside that of the planted
subspace itself, of random ones and of the whole vector, and the angles between the two.

``real``: the model that the package ships, or ``--model``, fine-tuned whole on a task with two
variables: four words and one of four questions about them, *are the first two the same? the last
two? both? either?* Where is the answer to the first? IIA by block and position, beside random
subspaces, and beside DAS on the same model with shuffled weights, which must stay near one half.

Command, from the repository root::

    python recipes/das_alignment.py
    python recipes/das_alignment.py --storage nf4
    python recipes/das_alignment.py --model DIR --part real

Expected with seed 0 on a CPU: in the planted model 99.6 % IIA (random subspace 15 %, chance
12.5 %), learned and planted subspace at most 19° apart (a random one: 71° to 88°). In the real
model 99.6 % at the second word in block 2 (random subspace 51 %), stored in fp32 or nf4; with
shuffled weights 60 % at most, the highest of fifteen places. At that word the whole vector does as
well as four dimensions. In a TinyStories Llama of 3 M parameters (``--tune-steps 500``) 88 % there,
and 94 % at the question in block 4, where the whole vector gives 66 %.

90 s of one core, 125 s with nf4, 150 s for the larger model; 0.6 GB of memory; 2026-11.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lowmem_reft  # noqa: F401 - before transformers imports bitsandbytes, whose notice it hides

# isort: split

import torch
from paper import RecipeConfig, run_recipe
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from lowmem_reft.base import load_base, load_tokenizer, save_base
from lowmem_reft.base.blocks import device_of, find_blocks
from lowmem_reft.data.embedded import model_dir
from lowmem_reft.errors import InputError, check_counts
from lowmem_reft.machine.devices import device_name
from lowmem_reft.machine.provenance import commit, versions
from lowmem_reft.memory import peak_rss_bytes
from lowmem_reft.options import Storage
from lowmem_reft.reft.config import check_layers, resolve_layers
from lowmem_reft.reft.rotation import orthonormal_rows
from lowmem_reft.runs.das import (
    Interchanges,
    Pairs,
    learn_subspace,
    principal_angles,
    random_subspace,
    whole_vector,
)

HELD_OUT = 0.25
"""Share of the prompts that neither the model nor R is trained on."""

NUM_VALUES, NUM_FILLERS = 8, 16
NUM_LOWER, NUM_BLOCKS = 2, 4
"""Blocks of the planted model: up to the last lower one the variable is in the subspace."""
PLANTED_RANK, PLANTED_POSITION = 4, 2
PLANTED_TUNE_STEPS, PLANTED_STEPS = 400, 300

NUM_WORDS = 6
POSITIONS = ("start", "first", "second", "third", "fourth", "question")
ANSWERS = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1], [0, 1, 1, 1]])
"""By question (the first two? the last two? both? either?) and kind: 2 · first + last."""


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """What to run."""

    part: Literal["planted", "real", "both"] = "both"
    """Which experiment."""
    model: str = str(model_dir())
    """Hub id or directory of the model for the real task; default: the one that the package ships.
    It is fine-tuned whole in fp32, so it must be a small one."""
    storage: Storage = "fp32"
    """How the tuned model is stored while R is learned."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    layers: str | None = None
    """Blocks to search, "0;2;4" or all; default: every second one."""
    rank: int = 4
    """Dimension of the subspace in the real model."""
    steps: int = 60
    """Optimizer steps of R in the real model, for each block and position."""
    tune_steps: int = 300
    """Optimizer steps of the fine-tuning."""
    threads: int = 1
    """Of torch; models this small are no faster with more."""
    seed: int = 0
    """Of weights, prompts and subspaces."""
    output_dir: Path = Path("das-alignment")
    """Takes results.json and both models."""
    quick: bool = False
    """Three steps of everything on a few pairs at one block, only to see that it runs."""

    def __post_init__(self) -> None:
        """Check the counts and the grammar of the layers."""
        check_counts(
            rank=self.rank, steps=self.steps, tune_steps=self.tune_steps, threads=self.threads
        )
        check_layers("all" if self.layers is None else self.layers)

    def limited(self, steps: int) -> int:
        """Return how many of these steps to take."""
        return min(3, steps) if self.quick else steps

    @property
    def num_pairs(self) -> tuple[int, int]:
        """Pairs to learn from and to hold out."""
        return (64, 64) if self.quick else (1024, 512)


def train(model: Any, loss: Callable[[], Tensor], *, num_steps: int, lr: float) -> None:
    """Train what requires a gradient: Muon for the blocks' matrices, AdamW for the rest."""
    ends = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in trained if p.ndim == 2 and all(p is not end for end in ends)]
    others = [p for p in trained if all(p is not matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    model.train()
    for step in range(num_steps):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 20, 1 - step / num_steps)
        loss().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    model.requires_grad_(False).eval()


def split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return (training, held-out) rows: none is in both."""
    rows = rows[torch.randperm(len(rows))]
    num_held_out = max(1, round(HELD_OUT * len(rows)))
    return rows[num_held_out:], rows[:num_held_out]


def answer_logits(model: Any, ids: Tensor, choices: Tensor) -> Tensor:
    """Return (num_prompts, num_answers): the logits of the possible answers after each prompt."""
    device = device_of(model)
    logits: Tensor = model(input_ids=ids.to(device), logits_to_keep=1).logits
    return logits[:, -1, choices.to(device)].float()


@torch.no_grad()
def task_accuracy(model: Any, ids: Tensor, answers: Tensor, choices: Tensor) -> float:
    """Share of right answers without any interchange."""
    found = answer_logits(model, ids, choices).argmax(1).cpu()
    return float((found == answers).float().mean())


# Part 1: a subspace that is known.


class Planted(NamedTuple):
    """A model that keeps a variable in a known subspace, and all of its prompts.

    A prompt is start, filler, key, question. The key stands for a ``value`` and a ``shift``; the
    answer is (value + shift) mod 8, and ``value`` is what is planted.
    """

    model: LlamaForCausalLM
    subspace: Tensor
    """(PLANTED_RANK, hidden): U, orthonormal rows."""
    prompts: Tensor
    """(num_prompts, 4) token ids."""
    value: Tensor
    """(num_prompts,)"""
    shift: Tensor
    """(num_prompts,)"""
    choices: Tensor
    """(NUM_VALUES,) token ids of the answers."""


def plant() -> Planted:
    """Build the model; its blocks above the lower ones, and its head, are yet to be trained.

    An embedding holds the value's code in U and all else outside of U. The lower blocks neither
    read U nor write to it, for their weights are W(I − UᵀU) and (I − UᵀU)W; and as all codes have
    length one, the norms say nothing of the value either. So up to the last lower block the value
    is in U at the key's position and nowhere else, whatever these blocks do with the rest.
    """
    start, question, fillers, keys = 0, 1, 2, 2 + NUM_FILLERS
    answers = keys + NUM_VALUES**2
    config = LlamaConfig(
        vocab_size=answers + NUM_VALUES,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4,
        max_position_embeddings=16,
        initializer_range=0.1,  # at the usual 0.02 the lower blocks would do next to nothing
        use_cache=False,
    )
    model = LlamaForCausalLM(config).requires_grad_(False)
    subspace = orthonormal_rows(torch.randn(PLANTED_RANK, config.hidden_size))
    outside = torch.eye(config.hidden_size) - subspace.T @ subspace
    codes = torch.cat([subspace, -subspace])  # of the eight values: the unit vectors of U
    value, shift = torch.tensor(list(product(range(NUM_VALUES), repeat=2))).T
    vectors = normalize(torch.randn(config.vocab_size, config.hidden_size) @ outside)
    vectors[keys:answers] = vectors[keys : keys + NUM_VALUES][shift] + codes[value]
    model.model.embed_tokens.weight.copy_(vectors)
    blocks = find_blocks(model)[1]
    for name, module in blocks[:NUM_LOWER].named_modules():
        if name.endswith(("o_proj", "down_proj")):
            module.weight.copy_(outside @ module.weight)
        elif name.endswith("_proj"):
            module.weight.copy_(module.weight @ outside)
    for part in (*blocks[NUM_LOWER:], model.lm_head):
        part.requires_grad_(True)
    filler, key = torch.tensor(list(product(range(NUM_FILLERS), range(NUM_VALUES**2)))).T
    constant = torch.ones_like(key)
    prompts = torch.stack([start * constant, fillers + filler, keys + key, question * constant], 1)
    choices = torch.arange(answers, config.vocab_size)
    return Planted(model, subspace, prompts, value[key], shift[key], choices)


def planted_interchanges(planted: Planted, rows: Tensor, num_pairs: int) -> Interchanges:
    """Draw pairs among ``rows``; the answer is that of the source's value and the base's shift."""
    base, source = rows[torch.randint(len(rows), (2, num_pairs))]
    answers = (planted.value[source] + planted.shift[base]) % NUM_VALUES
    return Interchanges(
        planted.model,
        Pairs(planted.prompts[base], planted.prompts[source], answers),
        choices=planted.choices,
        layer=NUM_LOWER - 1,
        position=PLANTED_POSITION,
    )


def run_planted(config: Config) -> dict[str, Any]:
    """Plant a subspace, search it, compare."""
    set_seed(config.seed)
    started = time.perf_counter()
    planted = plant()
    answers = (planted.value + planted.shift) % NUM_VALUES
    fit_rows, test_rows = split(torch.arange(len(planted.prompts)))

    def loss() -> Tensor:
        rows = fit_rows[torch.randint(len(fit_rows), (128,))]
        logits = answer_logits(planted.model, planted.prompts[rows], planted.choices)
        return cross_entropy(logits, answers[rows])

    train(planted.model, loss, num_steps=config.limited(PLANTED_TUNE_STEPS), lr=5e-3)
    learned = learn_subspace(
        planted_interchanges(planted, fit_rows, config.num_pairs[0]),
        rank=PLANTED_RANK,
        num_steps=config.limited(PLANTED_STEPS),
    )
    exact, other = (random_subspace(planted.model, PLANTED_RANK) for _ in range(2))
    exact.rotation.raw.data.copy_(planted.subspace)
    held_out = planted_interchanges(planted, test_rows, config.num_pairs[1])
    exchanged = {"planted": exact, "learned": learned, "random": other, "whole": whole_vector}
    return {
        "task_accuracy": task_accuracy(
            planted.model, planted.prompts[test_rows], answers[test_rows], planted.choices
        ),
        "iia": {name: held_out.accuracy(change) for name, change in exchanged.items()},
        "chance": 1 / NUM_VALUES,
        "angles_degrees": {
            name: principal_angles(phi.rotation(), planted.subspace)
            for name, phi in (("learned", learned), ("random", other))
        },
        "wall_s": time.perf_counter() - started,
    }


def print_planted(result: dict[str, Any], console: Console) -> None:
    """Print accuracies and angles."""
    table = Table("planted: exchanged", "IIA %", "angles to the planted subspace", box=None)
    for name, value in {**result["iia"], "chance": result["chance"]}.items():
        angles = result["angles_degrees"].get(name, [])
        table.add_row(name, f"{100 * value:.1f}", ", ".join(f"{angle:.0f}°" for angle in angles))
    console.print(table)


# Part 2: a subspace of a model that has learned its task.


class Words(NamedTuple):
    """Token ids that the task is written with."""

    start: int
    words: Tensor
    questions: Tensor
    choices: Tensor
    """No and yes."""


def find_words(tokenizer: Any) -> Words:
    """Take the first tokens of a vocabulary that are words after a space."""
    sizes = [NUM_WORDS, len(ANSWERS), 2]
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    found = [
        index
        for index, token in enumerate(tokens)
        if len(token) > 3 and token[0] in "Ġ▁" and token[1:].isascii() and token[1:].isalpha()
    ]
    if len(found) < sum(sizes):
        raise InputError(
            f"model must have a tokenizer with {sum(sizes)} tokens that are words, got "
            f"{len(found)}; use one with byte-level BPE or SentencePiece"
        )
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return Words(start, *torch.tensor(found[: sum(sizes)]).split(sizes))


def split_words() -> tuple[list[Tensor], list[Tensor]]:
    """Return all ways to choose four words, (num, 4) for each kind: training, then held out."""
    four = torch.tensor(list(product(range(NUM_WORDS), repeat=4)))
    same = four[:, 0::2] == four[:, 1::2]
    kind = 2 * same[:, 0] + same[:, 1]
    halves = [split(four[kind == wanted]) for wanted in range(4)]
    return [fit for fit, _ in halves], [held_out for _, held_out in halves]


def write_prompts(words: Words, pools: list[Tensor], kind: Tensor, question: Tensor) -> Tensor:
    """Return prompts of these kinds, (n, 6) token ids: start, four words, question."""
    drawn = torch.stack([pool[torch.randint(len(pool), kind.shape)] for pool in pools])
    four = drawn[kind, torch.arange(len(kind))]
    start = torch.full((len(kind), 1), words.start)
    return torch.cat([start, words.words[four], words.questions[question][:, None]], 1)


def draw_tasks(words: Words, pools: list[Tensor], num: int) -> tuple[Tensor, Tensor]:
    """Return prompts (num, 6) and their answers (num,)."""
    kind, question = torch.randint(4, (num,)), torch.randint(len(ANSWERS), (num,))
    return write_prompts(words, pools, kind, question), ANSWERS[question, kind]


def draw_pairs(words: Words, pools: list[Tensor], num: int) -> Pairs:
    """Draw pairs that exchange the first variable, "are the first two the same?".

    The base's own answer and the one under the interchange are balanced: each of their four
    combinations is a quarter of the pairs, so a run that keeps its answer, and one that always
    gives the same, are right on half of them. The source asks any question.
    """
    base, source, question = torch.tensor(list(product(range(4), range(4), range(len(ANSWERS))))).T
    exchanged = 2 * (source // 2) + base % 2
    combination = 2 * ANSWERS[question, base] + ANSWERS[question, exchanged]
    rows = torch.multinomial(1 / combination.bincount()[combination], num, replacement=True)
    base, source, question, exchanged = (x[rows] for x in (base, source, question, exchanged))
    return Pairs(
        write_prompts(words, pools, base, question),
        write_prompts(words, pools, source, torch.randint(len(ANSWERS), (num,))),
        ANSWERS[question, exchanged],
    )


def shuffle_weights(model: Any) -> None:
    """Put the entries of each tensor in random places: a random model of the same scale."""
    for parameter in model.parameters():
        order = torch.randperm(parameter.numel(), device=parameter.device)
        parameter.data = parameter.data.flatten()[order].view_as(parameter)


def make_models(config: Config, words: Words, pools: list[Tensor]) -> dict[str, Any]:
    """Fine-tune, shuffle a copy, and load both as they are to be stored."""
    model: Any = load_base(config.model, storage="fp32", device=config.device)
    model.requires_grad_(True)

    def loss() -> Tensor:
        ids, answers = draw_tasks(words, pools, 32)
        logits = answer_logits(model, ids, words.choices)
        return cross_entropy(logits, answers.to(logits.device))

    train(model, loss, num_steps=config.limited(config.tune_steps), lr=2e-3)
    models = {}
    for name in ("tuned", "shuffled"):
        if name == "shuffled":
            shuffle_weights(model)
        save_base(model, config.output_dir / name)
        models[name] = load_base(
            config.output_dir / name, storage=config.storage, device=config.device
        )
    return models


def search(config: Config, fit: Interchanges, held_out: Interchanges) -> dict[str, float]:
    """Learn a subspace at one place; return its IIA and those of what is exchanged instead."""
    phi = learn_subspace(fit, rank=config.rank, num_steps=config.limited(config.steps))
    other = random_subspace(fit.model, config.rank)
    exchanged = {"learned": phi, "random": other, "whole": whole_vector}
    return {name: held_out.accuracy(change) for name, change in exchanged.items()}


def search_all(
    config: Config, model: Any, pairs: list[Pairs], choices: Tensor
) -> list[dict[str, Any]]:
    """Search every position of every chosen block."""
    num_layers = len(find_blocks(model)[1])
    wanted = list(range(0, num_layers, 2)) if config.layers is None else config.layers
    cells = []
    for layer in resolve_layers(wanted, num_layers)[: 1 if config.quick else None]:
        runs = [
            Interchanges(model, part, choices=choices, layer=layer, position=0) for part in pairs
        ]
        for position in range(1, len(POSITIONS)):
            iia = search(config, *(part.at(position) for part in runs))
            cells.append({"layer": layer, "position": POSITIONS[position], **iia})
    return cells


def run_real(config: Config) -> dict[str, Any]:
    """Fine-tune, search blocks and positions, and do the same with shuffled weights."""
    set_seed(config.seed)
    started = time.perf_counter()
    words = find_words(load_tokenizer(config.model))
    pools = split_words()
    models = make_models(config, words, pools[0])
    tune_s = time.perf_counter() - started
    pairs = [
        draw_pairs(words, pool, num) for pool, num in zip(pools, config.num_pairs, strict=True)
    ]
    grids = {
        name: search_all(config, model, pairs, words.choices) for name, model in models.items()
    }
    tasks = draw_tasks(words, pools[1], config.num_pairs[1])
    return {
        "task_accuracy": {
            name: task_accuracy(model, *tasks, words.choices) for name, model in models.items()
        },
        "chance": 0.5,
        "grids": grids,
        "best": {
            name: max(cells, key=lambda cell: cell["learned"]) for name, cells in grids.items()
        },
        "tune_s": tune_s,
        "wall_s": time.perf_counter() - started,
    }


def print_real(result: dict[str, Any], console: Console) -> None:
    """Print the accuracies by position and block."""
    rows: dict[str, list[str]] = {position: [] for position in POSITIONS[1:]}
    for tuned, shuffled in zip(*result["grids"].values(), strict=True):
        shown = (tuned["learned"], tuned["random"], shuffled["learned"])
        rows[tuned["position"]].append(" / ".join(f"{100 * value:.0f}" for value in shown))
    layers = dict.fromkeys(cell["layer"] for cell in result["grids"]["tuned"])
    table = Table("real: position", *(f"block {layer}" for layer in layers), box=None)
    for position, cells in rows.items():
        table.add_row(position, *cells)
    console.print("IIA %: learned subspace / random subspace / learned on shuffled weights")
    console.print(table)
    accuracy = {name: f"{100 * x:.1f} %" for name, x in result["task_accuracy"].items()}
    console.print(f"task accuracy: {accuracy}; chance 50 %", highlight=False)


def main(config: Config) -> dict[str, Any]:
    """Run the chosen experiments and write ``results.json``."""
    torch.set_num_threads(config.threads)
    console = Console(stderr=True)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "config": {key: str(value) for key, value in asdict(config).items()},
        "device": device_name(config.device),
        "versions": versions(),
        "commit": commit(),
    }
    if config.part != "real":
        result["planted"] = run_planted(config)
        print_planted(result["planted"], console)
    if config.part != "planted":
        result["real"] = run_real(config)
        print_real(result["real"], console)
    result["rss_bytes"] = peak_rss_bytes()
    (config.output_dir / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    run_recipe(Config, main, __doc__)
