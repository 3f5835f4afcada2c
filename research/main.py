"""python -m research.main --config=configs/NAME.py[:VARIANT] --workdir=DIR [--mode=MODE] [--config.KEY=VALUE ...]

Modes:
  train     train, evaluate, and go on where the run in --workdir stopped (the default)
  evaluate  a checkpoint through config.evals
  predict   JSON lines in (--input), the same with predictions out (--output)
  export    a folder that Hugging Face's from_pretrained loads (--output)

All but train use the config of the run in --workdir where --config is left out.
Exit status: 0 done; 2 your mistake, said in one line; 75 preempted after saving, run the same again; 1 anything else.
"""

import importlib
import logging
import os
import pathlib
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from research import overrides
from research.errors import UserError, nearest

MODES = {
    "train": (),
    "evaluate": ("checkpoint",),
    "predict": ("checkpoint", "input", "output"),
    "export": ("checkpoint", "output"),
}
FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "The config file, with its variant after a colon.", lock_config=True)
flags.DEFINE_string("workdir", None, "The run's folder.")
flags.DEFINE_string("mode", "train", f"One of {', '.join(MODES)}.")
flags.DEFINE_string("checkpoint", "", "latest, best or a step; by default the best, where the run keeps it.")
flags.DEFINE_string("input", "-", "predict: the JSON lines to read; - is the standard input.")
flags.DEFINE_string(
    "output", "", "predict: the file to write, else the standard output; export: the folder, else DIR/export."
)
flags.DEFINE_bool("distributed", False, "Join the other processes of a pod or a cluster before starting.")


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        overrides.parse(FLAGS, argv)
        return _dispatch()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _dispatch() -> int:
    if FLAGS.mode not in MODES:
        raise UserError(f"--mode: there is no '{FLAGS.mode}'{nearest(FLAGS.mode, MODES)}")
    for name in {name for names in MODES.values() for name in names} - set(MODES[FLAGS.mode]):
        if FLAGS[name].present:
            raise UserError(f"--{name}: --mode={FLAGS.mode} takes no such flag")
    if not FLAGS.workdir:
        raise UserError("--workdir: say which folder holds, or will hold, the run")
    if FLAGS.config is None and FLAGS.mode == "train":
        raise UserError("--config: say which config file to train, such as --config=configs/movie_snippets.py")
    workdir = pathlib.Path(FLAGS.workdir).expanduser().absolute()
    import jax

    from research.checkpoint import SaveError, UnreadableCheckpointError, quieten
    from research.meter import NonFiniteError
    from research.preemption import PreemptedError
    from research.record import load_config

    cache = pathlib.Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or "~/.cache/research/compiled").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if FLAGS.distributed:
        # Cloud TPU and Slurm say who takes part; elsewhere these variables and JAX_COORDINATOR_ADDRESS do.
        count, index = (os.environ.get(f"JAX_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID"))
        jax.distributed.initialize(
            num_processes=int(count) if count else None, process_id=int(index) if index else None
        )
    quieten()
    config = load_config(workdir) if FLAGS.config is None else FLAGS.config
    run = importlib.import_module(f"research.{FLAGS.mode}").run
    try:
        run(config, workdir, **{name: FLAGS[name].value for name in MODES[FLAGS.mode]})
    except PreemptedError as error:
        print(f"preempted: {error}", file=sys.stderr)
        return 75
    except (NonFiniteError, UnreadableCheckpointError, SaveError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
