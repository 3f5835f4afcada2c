"""python -m research.main --config=configs/NAME.py[:VARIANT] --workdir=DIR [--mode=MODE] [--config.KEY=VALUE ...]

Modes:
  train      train, evaluate, and resume the run in --workdir if there is one (the default)
  evaluate   a checkpoint through config.evals, or on tasks of EleutherAI's evaluation harness (--harness)
  predict    JSON lines in (--input), the same with predictions out (--output)
  generate   text: what follows --prompt, as it is written, or JSON lines as in predict; --config.decoding says how.
             images, of a diffusion run: a PNG file; --config.task.sampling and --config.seed say how
  export     a folder that Hugging Face's from_pretrained loads (--output)
  prepare    the data of --config, into the cache, ahead of a run: tokenised and measured; several processes that are
             started at once, on one machine or on several with one cache, share the work; needs no --workdir
  sweep      the points of get_sweep() in --config, each in a process of its own: what is left of them, as a run would
             resume; --workdir holds a folder for each, and sweep.json
  choose     which of --candidates suits the task of --config, a fine-tuning: each is scored by what its features say of
             training examples, beside the cost of fine-tuning it; choose.json and choose.png go to --workdir
  explain    why a checkpoint says what it says of --input: attributions, attention, the logit lens; a page for the
             browser, and its numbers in an .npz file beside it
  plan       what --config needs on --topology: memory, operations, hours; reads no data, and needs no --workdir

Flags:
  --config        the config file and, after a colon, its variant; all modes but train take that of the run in --workdir
                  where it is left out
  --config.KEY    overrides a value of the config: --config.optimizer.learning_rate=3e-5
  --workdir       the run's folder, local or in a bucket (gs://bucket/run), as all paths here may be
  --mode          one of the above
  --checkpoint    latest, best or a step, in all modes but train; by default the best, where the run keeps it
  --prompt        generate: the text to continue, or to translate, or to answer with --config.decoding.chat=true.
                  images: their classes, as in --prompt="Sneaker*8, Bag"; left out, eight of each
  --input         predict: the file to read; by default, and for -, the standard input.
                  explain: the same file or images, 32 examples at most.
                  generate: instead of --prompt, a file of lines {"prompt": ...}, {"messages": [...]} or plain text
  --output        predict, generate: the file to write; by default, and for -, the standard output.
                  images: a .png file for a grid, a folder for a file each, or an .npz file for the numbers
                  export: the folder to write; by default export in the run's folder
                  plan: a file for the result as JSON
                  explain: a file that ends in .html; by default explain.html in the run's folder
  --target        explain: what to explain instead of the prediction: the name of a class or label, the next token, or
                  the text that an encoder-decoder might have written
  --candidates    choose: separated by commas: models as config.init.path takes them (a folder, hf://, pypi://), which
                  take the place of the config's; folders of runs; configs/NAME.py:VARIANT for the same data, as they
                  stand (overrides are --config's own)
  --examples      choose: of the training data, that features are taken of; 2000 by default
  --harness       evaluate: tasks of the harness, separated by commas, for a causal language model (the extra "evals"):
                  hellaswag,arc_easy; results go to harness.json in --workdir. Without a run: the weights of config.init
  --harness_include
                  evaluate: a folder of tasks of your own for --harness, YAML files as the harness reads them
  --profile_steps train: FIRST:END, the steps of which a trace, for xprof and Perfetto, goes to the run's folder
  --stop_at       train: a step, or a share of the run below 1, at which to evaluate, save and stop with status 75
  --parallel      sweep: points that run at once; 1 by default
  --shard         sweep: 3/16 runs the third of sixteen parts, for array jobs that share a folder
  --metric        sweep: by which points are ranked, test/accuracy or test/loss:min; config.checkpoint.best by default
  --halving       sweep: successive halving; 3 lets the best third go on, at growing shares of the run
  --topology      plan, choose: a TPU slice (v5e:4x4, v5p:4x4x8), compiled for with the extra "tpu"; GPUs (h100x8), with
                  the extra "gpu-compiler", and else by arithmetic; or cpu. By default the config's own,
                  config.plan.topology; else, in choose, what is here
  --utilisation   plan: the share of the peak at which hours are told; 0.4 by default
  --price         plan: of a chip and hour
  --trust         modules whose code the config.json of a run's folder may call besides this package's models, tasks,
                  data and the like: --trust=mypackage; repeatable, or separated by commas. What --config and overrides
                  name needs no flag
  --distributed   join the other processes of a pod or a cluster before starting (docs/pods.md)
  --join_timeout  with --distributed: seconds to wait for the others; 300 by default

Exit status: 0 done; 2 your mistake, said in one line; 75 preempted after saving, run the same again; 1 anything else.
"""

import argparse
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from research import storage
from research.configuration import overrides, trust
from research.errors import UserError, nearest
from research.runtime import allocator, hosts, memory

MODES = {
    "train": ("profile_steps", "stop_at"),
    "evaluate": ("checkpoint", "harness", "harness_include"),
    "predict": ("checkpoint", "input", "output"),
    "generate": ("checkpoint", "prompt", "input", "output"),
    "export": ("checkpoint", "output"),
    "prepare": (),
    "sweep": ("parallel", "shard", "metric", "halving"),
    "choose": ("candidates", "examples", "topology"),
    "explain": ("checkpoint", "input", "output", "target"),
    "plan": ("topology", "output", "utilisation", "price"),
}
OWN = tuple(dict.fromkeys(name for names in MODES.values() for name in names))  # flags of some modes
FLAGS = ("config", "workdir", "mode", *OWN)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def main(argv: Sequence[str]) -> int:
    """Run the command line, without the program's name, and return the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)  # libraries tell of their options
    if not argv or {"-h", "--help"} & set(argv):
        print(__doc__, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    try:
        return hosts.leave(_run(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return hosts.leave(2)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name in FLAGS:
        parser.add_argument(f"--{name}")
    parser.add_argument("--trust", action="append", default=[])
    parser.add_argument("--distributed", action="store_true")
    parser.add_argument("--join_timeout")
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].partition("=")[0]
        if not name.startswith("--"):
            raise UserError(f"'{name}' is no flag; flags begin with -- and hold no spaces around =")
        known = [f"--{flag}" for flag in (*FLAGS, "trust", "distributed", "join_timeout")]
        raise UserError(f"{name}: there is no such flag{nearest(name, known)}")
    flags.mode = flags.mode or "train"
    if flags.mode not in MODES:
        raise UserError(f"--mode: there is no '{flags.mode}'{nearest(flags.mode, MODES)}")
    for name in OWN:
        if getattr(flags, name) is not None and name not in MODES[flags.mode]:
            raise UserError(f"--{name}: --mode={flags.mode} takes no such flag")
    for name in ("utilisation", "price", "join_timeout"):
        _check_number(name, getattr(flags, name))
    if flags.join_timeout and not flags.distributed:
        raise UserError("--join_timeout: it says how long --distributed waits; add --distributed")
    if not flags.workdir and flags.mode not in ("plan", "prepare"):
        raise UserError("--workdir: say which folder holds, or will hold, the run")
    if not flags.config and (flags.mode in ("train", "sweep") or not flags.workdir):
        raise UserError(f"--config: say which config file to {flags.mode}, such as --config=configs/movie_snippets.py")
    if flags.harness_include is not None and flags.harness is None:
        raise UserError("--harness_include: it holds tasks for --harness; name them there")
    if flags.mode == "choose" and not flags.candidates:
        raise UserError("--candidates: say which models to choose from, separated by commas")
    return flags


def _check_number(name: str, value: str | None) -> None:
    """Raise UserError unless a flag is a positive number, or not there."""
    try:
        good = value is None or float(value) > 0
    except ValueError:
        good = False
    if not good:
        raise UserError(f"--{name}: {value} is not a positive number")


def _run(argv: Sequence[str]) -> int:
    changes, rest = overrides.split(argv)
    flags = _parse(rest)
    with trust.also([module for value in flags.trust for module in value.split(",")]):
        return _run_mode(flags, changes)


def _run_mode(flags: argparse.Namespace, changes: Sequence[overrides.Override]) -> int:
    workdir = storage.path(flags.workdir or ".").absolute()
    storage.check_folder("--workdir", workdir, writes=flags.mode in ("train", "sweep", "choose"))
    if flags.config:
        config = overrides.load(flags.config)
        overrides.apply(config, changes)  # before JAX is imported, which takes seconds
    if flags.mode == "plan" and flags.topology not in ("gpu", "tpu"):
        # Whatever accelerator there is, it is not what is planned for; and no machine is to be asked what it is.
        os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
    allocator.keep()

    from research import evaluate
    from research.checkpoint import SaveError, UnreadableCheckpointError, quieten
    from research.reporting.meter import NonFiniteError
    from research.reporting.record import load_config
    from research.runtime.preemption import PreemptedError
    from research.sweep import PointsFailedError

    _start_jax()
    if flags.distributed:
        shared = workdir if flags.workdir and flags.mode == "train" else None
        try:
            hosts.join(config if flags.config else None, shared, float(flags.join_timeout or hosts.JOIN_SECONDS))
        except (hosts.HostsError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    quieten()
    if not flags.config:
        config = load_config(workdir)
        overrides.apply(config, changes)
    module = flags.mode if flags.harness is None else "harness"  # another way to evaluate
    run = importlib.import_module(f"research.{module}").run
    given = {name: getattr(flags, name) for name in MODES[flags.mode]}
    if flags.mode == "sweep":
        given |= {"file": flags.config, "changes": changes}
    try:
        with hosts.settling():
            run(config, workdir, **{name: value for name, value in given.items() if value is not None})
    except PreemptedError as error:
        print(f"preempted: {error}", file=sys.stderr)
        return 75
    except evaluate.EvaluationError as error:
        traceback.print_exception(error.__cause__)
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (NonFiniteError, UnreadableCheckpointError, SaveError, PointsFailedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if (line := memory.explain(error) or storage.explain(error)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 1
    return 0


def _start_jax() -> None:
    """Keep compiled programs on disk between runs."""
    import jax

    cache = storage.path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or "~/.cache/research/compiled")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
