"""The recipe of configs/movie_snippets.py in Transformers' Trainer: the bar to compare with.

Needs torch, transformers and accelerate (`pip install -e .[peers]`), and nothing of this project.

    python experiments/movie_snippets/peer_trainer.py --model DIR --data FILE --output DIR --seed 0

`--model` is a Hugging Face folder (all-MiniLM-L6-v2) and `--data` is
movieReviewSnippets_GroundTruth.txt, as configs/movie_snippets.py fetches them. The output folder
holds config.json, run.json, metrics.jsonl and result.json, as a run of this project does.
"""

import argparse
import datetime
import json
import math
import os
import pathlib
import platform
import resource
import shlex
import subprocess
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is read from the two arguments
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import accelerate
import numpy as np
import torch
import transformers

RECIPE = {
    "trainer": "transformers.Trainer",
    "batch_size": 32,
    "num_epochs": 2,
    "max_length": 64,
    "dropout": 0.1,
    "learning_rate": 5e-5,
    "schedule": "linear",
    "warmup_fraction": 0.1,
    "weight_decay": 0.01,
    "clip_norm": 1.0,
}
LOG_EVERY = 50
SCALARS = {  # the Trainer's names -> this project's
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/gradient_norm",
    "eval_loss": "test/loss",
    "eval_accuracy": "test/accuracy",
}


def read_snippets(path: pathlib.Path) -> tuple[list[dict], list[dict]]:
    """Read (train, test) rows {"text", "label"}; the test rows are every tenth by ascending id."""
    rows, seen = [], set()
    lines = path.read_bytes().decode("utf-8").split("\n")
    for line in sorted(filter(None, lines), key=lambda line: int(line.split("\t")[0])):
        _, rating, text = line.rstrip("\r").split("\t")
        text = text.strip()
        if float(rating) == 0 or text in seen:
            continue
        seen.add(text)
        rows.append({"text": text, "label": int(float(rating) > 0)})
    train = [row for position, row in enumerate(rows) if position % 10]
    return train, rows[::10]


def tokenise(rows: list[dict], tokenizer) -> list[dict]:
    """Return rows of token ids cut to the recipe's length; padding is left to the collator."""
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=RECIPE["max_length"])
    return [
        {**{key: values[i] for key, values in encoded.items()}, "label": row["label"]} for i, row in enumerate(rows)
    ]


class Recorder(transformers.TrainerCallback):
    """Keeps the logged scalars under this project's names, and the time at which steps end."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.path.write_text("")
        self.step_ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.step_ends.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **kwargs):
        named = {SCALARS[key]: float(value) for key, value in logs.items() if key in SCALARS}
        if named:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **named}) + "\n")


def examples_after_first_step(num_steps: int, num_examples: int) -> int:
    """Count the examples in steps 2 to `num_steps`; the last batch of an epoch is smaller."""
    batch, last = RECIPE["batch_size"], num_examples % RECIPE["batch_size"]
    per_epoch = math.ceil(num_examples / batch)
    short = num_steps // per_epoch if last else 0
    return (num_steps - 1) * batch - short * (batch - last)


def git_revision() -> dict | None:
    """The commit that this file is at, and whether tracked files have changed; None outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(pathlib.Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=pathlib.Path, required=True, help="Hugging Face folder")
    parser.add_argument("--data", type=pathlib.Path, required=True, help="the snippets' TSV file")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder of the record")
    parser.add_argument("--seed", type=int, default=0, help="head, dropout and order of the data")
    parser.add_argument("--max-steps", type=int, default=None, help="stop early (for timing)")
    parser.add_argument("--no-eval", action="store_true", help="skip the test rows (for timing)")
    parser.add_argument("--threads", type=int, default=2, help="threads that PyTorch may use")
    return parser.parse_args()


def make_trainer(arguments, train: list[dict], test: list[dict], recorder: Recorder):
    """Build the model and its Trainer; whatever the recipe leaves open is the Trainer's default."""
    transformers.set_seed(arguments.seed)  # before the model: it draws the head
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        arguments.model,
        num_labels=2,
        hidden_dropout_prob=RECIPE["dropout"],
        attention_probs_dropout_prob=RECIPE["dropout"],
    ).float()
    steps_per_epoch = math.ceil(len(train) / RECIPE["batch_size"])
    num_steps = arguments.max_steps or RECIPE["num_epochs"] * steps_per_epoch
    training = transformers.TrainingArguments(
        output_dir=str(arguments.output),
        per_device_train_batch_size=RECIPE["batch_size"],
        per_device_eval_batch_size=RECIPE["batch_size"],
        max_steps=num_steps,
        learning_rate=RECIPE["learning_rate"],
        lr_scheduler_type=RECIPE["schedule"],
        warmup_steps=math.ceil(RECIPE["warmup_fraction"] * num_steps),
        weight_decay=RECIPE["weight_decay"],
        max_grad_norm=RECIPE["clip_norm"],
        seed=arguments.seed,
        use_cpu=True,
        save_strategy="no",
        logging_steps=LOG_EVERY,
        report_to="none",
        disable_tqdm=True,
    )
    return transformers.Trainer(
        model=model,
        args=training,
        train_dataset=tokenise(train, tokenizer),
        eval_dataset=tokenise(test, tokenizer),
        processing_class=tokenizer,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": float(np.mean(p[0].argmax(-1) == p[1]))},
        callbacks=[recorder],
    )


def main():
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)

    def write(name: str, value: dict):
        (arguments.output / name).write_text(json.dumps(value, indent=2) + "\n")

    run = {
        "command": shlex.join(sys.orig_argv),
        "git": git_revision(),
        "python": platform.python_version(),
        "packages": {module.__name__: module.__version__ for module in (torch, transformers, accelerate)},
        "devices": {"kind": "cpu", "count": 1, "hosts": 1},
        "cpus": os.cpu_count(),
        "threads": arguments.threads,
        "seed": arguments.seed,
        "start": now(),
        "end": None,
        "ended": "running",
    }
    write("run.json", run)

    train, test = read_snippets(arguments.data)
    recorder = Recorder(arguments.output / "metrics.jsonl")
    trainer = make_trainer(arguments, train, test, recorder)
    schedule = {"num_steps": trainer.args.max_steps, "warmup_steps": int(trainer.args.warmup_steps)}
    write("config.json", {"seed": arguments.seed, **RECIPE, **schedule})

    started = time.perf_counter()
    trainer.train()
    train_seconds = time.perf_counter() - started
    metrics = {} if arguments.no_eval else {"test/accuracy": trainer.evaluate()["eval_accuracy"]}

    steps = trainer.state.global_step
    counted = examples_after_first_step(steps, len(train))
    after_first = recorder.step_ends[-1] - recorder.step_ends[0]
    run.update(end=now(), ended="finished")
    write("run.json", run)
    result = {
        "step": steps,
        "metrics": metrics,
        "train_seconds": train_seconds,
        # From the end of the first step: it is slower, and the other side's is not counted either.
        "examples_per_second": counted / after_first if steps > 1 else None,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "train_examples": len(train),
        "test_examples": len(test),
    }
    write("result.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
