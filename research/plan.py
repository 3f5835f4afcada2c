"""--mode=plan: what a config needs on hardware that is not here: memory, operations, time; no data are read."""

import copy
import dataclasses
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from research import flops, storage, train
from research.build import locate
from research.errors import UserError, nearest
from research.experiment import Experiment, task_section
from research.optimizer import moving
from research.reporting.record import write_json
from research.reporting.writers import Progress, duration
from research.runtime import absent_gpus
from research.task import Adapts

TOKENS_PER_PARAMETER = 20  # compute-optimal (Hoffmann 2022, section 3)
STEPS = 10_000  # assumed where a config counts epochs of data that are not here
MOST_TRIES = 8  # compilations in search of what would fit


@dataclasses.dataclass(frozen=True)
class Target:
    """What is planned for.

    Attributes:
      name: as it was asked for, "v5p:4x4x4".
      devices: real ones, or those that a compiler knows; only their number where there is neither.
      chips: how many chips they are.
      chip: what one can do; None where that is not known.
    """

    name: str
    devices: list[Any] | int
    chips: int
    chip: flops.Chip | None

    @property
    def count(self) -> int:
        """How many devices."""
        return self.devices if isinstance(self.devices, int) else len(self.devices)

    @property
    def memory(self) -> float | None:
        """Bytes of a device."""
        return None if self.chip is None else self.chip.memory * self.chips / self.count


def run(
    config: ConfigDict,
    workdir: pathlib.Path | None = None,
    topology: str | None = None,
    output: str | None = None,
    utilisation: float = 0.4,
    price: float | None = None,
) -> dict[str, Any]:
    """Print what training a config needs on some hardware, and return it.

    Args:
      config: see README.md. Its section `plan` may say what the data would: `vocab_size`, `length`, `examples`, and the
        `topology`; and what is `published` of a run like it.
      workdir: not used.
      topology: "v5p:4x4x4", any TPU slice that libtpu knows; "h100x8" and the like, by arithmetic where the extra
        "gpu-compiler" is missing; "cpu" or "gpu", the devices that are here. The config's where it is None.
      output: a file for the result as JSON.
      utilisation: the share of the chips' peak at which hours are told, beside those at the bound.
      price: of a chip and hour.

    Raises:
      UserError: the topology is not known, or something about the data must be said.
    """
    del workdir
    section = (config.get("plan") or ConfigDict()).to_dict()
    name = topology or section.get("topology")
    if name is None:
        raise UserError("--topology: say what to plan for, such as v5e:4x4, h100x8 or cpu; the config names none")
    utilisation, price = float(utilisation), None if price is None else float(price)
    target = find_target(name)
    result = needs(config, target)
    if result["fits"] is False:
        result["remedy"] = _remedy(config, target)
    result |= _time(config, result, target, utilisation, price)
    if "published" in section:
        result["published"] = section["published"]
    if output:
        write_json(storage.path(output), result)
    Progress(0, 0).table(f"{name}: {target.count} devices", _shown(result))
    return result


def find_target(name: str) -> Target:
    """Return the hardware of a name."""
    if found := re.fullmatch(r"(\w+)x(\d+)", name.lower()):
        kind, count = found[1], int(found[2])
        if kind not in flops.CHIPS:
            raise UserError(f"--topology: unknown chip '{kind}'{nearest(kind, flops.CHIPS)}")
        chip = flops.CHIPS[kind]
        return Target(name, absent_gpus.devices(kind, count, chip.memory, chip.bandwidth) or count, count, chip)
    if ":" not in name:
        if name != jax.default_backend():
            raise UserError(f"--topology: '{name}' is not here; a TPU slice is written v5e:4x4, GPUs h100x8")
        return Target(name, jax.devices(), jax.device_count(), flops.chip_of(jax.devices()[0]))
    kind, _, shape = name.partition(":")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no machine to be asked what it is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # planning holds no TPU that another process might want
    from jax.experimental import topologies

    try:
        devices = list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # libtpu raises what it likes
        missing = ("libtpu" in str(error) and "install" in str(error).lower()) or "not found" in str(error).lower()
        advice = 'install the extra "tpu"' if missing else "see the shapes that Google Cloud offers"
        first = str(error).strip().splitlines()[0][:300]
        raise UserError(f"--topology: no compiler for '{name}'; {advice} ({first})") from None
    chips = 1
    for side in shape.split("x"):
        chips *= int(side)
    return Target(name, devices, chips, flops.CHIPS.get(kind))


def needs(config: ConfigDict, target: Target) -> dict[str, Any]:
    """Return what a step of a config needs on every device, and what a step does."""
    assumed = assume(config)
    experiment = Experiment(config, assumed=assumed, devices=target.devices)
    state = experiment.abstract_state
    params = state.params
    result: dict[str, Any] = {
        "topology": target.name,
        "chips": target.chips,
        "devices": target.count,
        "mesh": dict(experiment.mesh.shape),
        "batch_size": config.batch_size,
        "assumed": assumed,
        "parameters": _count(experiment),
        "parameter_bytes": _bytes(params),
        "optimizer_bytes": _bytes(state.opt_state),
        "memory_bytes": target.memory,
        "operations": flops.of_training(experiment.trained_task, params, experiment.spec),
        "link_bytes": _link_bytes(experiment),
    }
    compiled = None if isinstance(target.devices, int) else _compiled(experiment, target)
    if compiled is None:
        freeze = (config.get("optimizer") or {}).get("freeze") or ()
        trained = jax.tree.map(lambda x, moves: x if moves else None, params, moving(freeze, params))
        # With gradients, and without activations.
        least = result["parameter_bytes"] + result["optimizer_bytes"] + _bytes(trained)
        compiled = {"compiled": False, "fits": False if least > (target.memory or least) else None}
    return result | compiled


def _compiled(experiment: Experiment, target: Target) -> dict[str, Any] | None:
    """Compile the real step, and return what the compiler says of its memory; None where it cannot be compiled here."""
    rows = NamedSharding(experiment.mesh, P(("data", "fsdp")))
    batch = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for k, x in experiment.spec.items()}
    print(f"compiling the step for {target.name}", file=sys.stderr, flush=True)
    begin = time.monotonic()
    try:
        with absent_gpus.assumed_cudnn(list(experiment.mesh.devices.flat)):
            compiled = train.jit_step(experiment).lower(experiment.abstract_state, batch).compile()
    except RuntimeError as error:
        if "Unknown backend" in str(error):
            print("the step calls back to the host, which only GPUs that are here can: by arithmetic", file=sys.stderr)
            return None
        seconds = time.monotonic() - begin
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used ([\d.]+)([KMGT]) of", str(error))
        peak = float(used[1]) * 1024 ** "_KMGT".index(used[2]) if used else None
        return {"compiled": True, "fits": False, "peak_bytes": peak, "compile_seconds": seconds}
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = held + memory.temp_size_in_bytes
    return {
        "compiled": True,
        "compile_seconds": time.monotonic() - begin,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": peak,
        "fits": None if target.memory is None else peak <= target.memory,
    }


def _count(experiment: Experiment) -> int:
    """Return the number of parameters; those of a base in fewer bits count as what they stand for."""
    task, params = experiment.trained_task, experiment.abstract_state.params
    counted: Any = params
    if isinstance(task, Adapts):
        counted = [task.join(params), *(part for name, part in params.items() if name not in ("base", "whole"))]
    return sum(x.size for x in jax.tree.leaves(counted))


def _bytes(tree: Any) -> int:
    """Return the bytes of a tree on one device."""
    total = 0
    for x in jax.tree.leaves(tree):
        size = x.dtype.itemsize
        for side in x.sharding.shard_shape(x.shape):
            size *= side
        total += size
    return total


def _link_bytes(experiment: Experiment) -> float:
    """Return what a device must exchange in a step for its parameters alone, in bytes, by arithmetic.

    Those that are split over "fsdp" are gathered for each pass of each microbatch, and their gradients are summed where
    they are kept; gradients of others are summed over all that hold them, which moves each twice.
    """
    mesh, total = experiment.mesh.shape, 0.0
    passes = 2 * experiment.optimizer.microbatches + 1
    for x in jax.tree.leaves(experiment.abstract_state.params):
        split = any("fsdp" in (axis if isinstance(axis, tuple) else (axis,)) for axis in x.sharding.spec)
        size = _bytes(x)
        if split:
            total += passes * size * (mesh["fsdp"] - 1)
        ways = mesh["data"] * (1 if split else mesh["fsdp"])
        total += 2 * size * (ways - 1) / ways
    return total


def assume(config: ConfigDict) -> dict[str, Any]:
    """Return what the data would say, from the config alone.

    Raises:
      UserError: something must be said in config.plan.
    """
    section = (config.get("plan") or ConfigDict()).to_dict()
    if config.get("derived"):
        return {
            **config.derived.to_dict(),
            **({"vocab_size": section["vocab_size"]} if "vocab_size" in section else {}),
        }
    steps = config.get("num_steps")
    if steps is None and "examples" in section:
        steps = max(int(config.num_epochs * section["examples"] / config.batch_size), 1)
    spec = {name: _feature(name, config, section) for name in [*config.data.features, "mask"]}
    return {
        "label_names": [],
        "num_steps": STEPS if steps is None else steps,
        "spec": {name: {"shape": [config.batch_size, *shape], "dtype": dtype} for name, (shape, dtype) in spec.items()},
        "vocab_size": section.get("vocab_size"),
    }


def _feature(name: str, config: ConfigDict, section: Mapping[str, Any]) -> tuple[list[int], str]:
    """Return the shape of one example's feature, and its dtype."""
    if name in ("mask", "label"):
        return [], "float32" if name == "mask" else "int32"
    ops = config.data.get("ops")
    boxes = _setting(ops, "max_boxes")
    model = task_section(config).model
    side = _setting(ops, "size") or _setting(model, "image_size")
    images = {
        "image": ([side, side, _setting(model, "num_channels") or 3], "float32"),
        "pixel_mask": ([side, side], "float32"),
        "boxes": ([boxes, 4], "float32"),
        "classes": ([boxes], "int32"),
        "box_mask": ([boxes], "float32"),
        "image_size": ([2], "float32"),
    }
    if name in images:
        shape, dtype = images[name]
        if None in shape:
            raise UserError(f"config.plan: the shape of '{name}' does not follow from the config")
        return shape, dtype
    decoder = "decoder_input_ids" in config.data.features and name.startswith(("decoder_", "target"))
    key = "decoder_length" if decoder else "length"
    packed, most = ("pack_decoder", "decoder_max_length") if decoder else ("pack", "max_length")
    length = section.get(key) or config.data.get(packed) or _setting(ops, most)
    if not length:
        raise UserError(f"config.plan.{key}: say how many tokens a row has; '{name}' needs it")
    return [length], "float32" if name == "target_mask" else "int32"


def _setting(node: Any, key: str) -> Any:
    """Return the last value of a key anywhere in a node; None where there is none."""
    if isinstance(node, ConfigDict | Mapping):
        inner = [found for name in node if (found := _setting(node[name], key)) is not None]
        value = node.get(key)
        return value if isinstance(value, int) else (inner[-1] if inner else None)
    if isinstance(node, list | tuple):
        inner = [found for item in node if (found := _setting(item, key)) is not None]
        return inner[-1] if inner else None
    return None


def _remedy(config: ConfigDict, target: Target) -> dict[str, Any] | None:
    """Return the first of some changes, cheapest first, with which a config fits, and its memory; None if none does."""
    for tries, (changes, changed) in enumerate(_cheaper(config, target)):
        if tries == MOST_TRIES:
            return None
        print("trying " + ", ".join(f"{k}={v}" for k, v in changes.items()), file=sys.stderr, flush=True)
        result = needs(changed, target)
        if result["fits"]:
            return {"changes": changes, "peak_bytes": result["peak_bytes"]}
    return None


def _cheaper(config: ConfigDict, target: Target) -> Iterator[tuple[dict[str, Any], ConfigDict]]:
    """Yield changes that take less memory, each in addition to those before, and the config with them."""
    changes: dict[str, Any] = {}
    config = copy.deepcopy(config)
    mesh = Experiment(config, assumed=assume(config), devices=target.devices).mesh.shape
    if mesh["data"] > 1:
        config.mesh = {"data": 1, "fsdp": -1, "model": mesh["model"]}
        changes["config.mesh"] = "dict(data=1, fsdp=-1)"
        yield dict(changes), config
    nodes = list(_nodes_with(task_section(config).model, "remat"))
    for policy in ("attention", "dots", "full"):
        if nodes and any(node.get("remat", "none") != policy for node in nodes) and _order(nodes) < _ORDER[policy]:
            for node in nodes:
                node.remat = policy
            changes["remat"] = policy
            yield dict(changes), config
    rows = config.batch_size // (mesh["data"] * mesh["fsdp"])
    microbatches = (config.get("optimizer") or {}).get("microbatches", 1)
    for factor in (2, 4, 8, 16, 32):
        if rows % (microbatches * factor) == 0:
            config.optimizer.microbatches = microbatches * factor
            changes["config.optimizer.microbatches"] = microbatches * factor
            yield dict(changes), config
    for format in ("bfloat16", "nf4") if "task" in config.task else ():  # a frozen base may be rounded
        config.task.base_format = format
        changes["config.task.base_format"] = format
        yield dict(changes), config


_ORDER = {"none": 0, "attention": 1, "dots": 2, "offload": 2, "full": 3}


def _order(nodes: list[ConfigDict]) -> int:
    return min(_ORDER[node.get("remat", "none")] for node in nodes)


def _nodes_with(node: Any, field: str) -> Iterator[ConfigDict]:
    """Yield the nodes whose class has a field of that name."""
    if isinstance(node, ConfigDict):
        if "call" in node and field in getattr(locate(node.call, "config.task.model"), "__dataclass_fields__", {}):
            yield node
        for key in node:
            yield from _nodes_with(node[key], field)


def _time(
    config: ConfigDict, result: Mapping[str, Any], target: Target, utilisation: float, price: float | None
) -> dict[str, Any]:
    """Return the bounds on a step's time, and what the whole run takes at the bound and at a share of the peak."""
    spec, steps = result["assumed"]["spec"], result["assumed"]["num_steps"]
    sequences = [name for name in ("input_ids", "decoder_input_ids") if name in spec]
    units = sum(_product(spec[name]["shape"]) for name in sequences) or config.batch_size
    told: dict[str, Any] = {"unit": "tokens" if sequences else "images", "units_per_step": units, "steps": steps}
    if "targets" in spec:
        told["tokens"] = units * steps
        told["compute_optimal_tokens"] = TOKENS_PER_PARAMETER * result["parameters"]
    chip = target.chip
    if chip is None:
        return told
    state = result["parameter_bytes"] + result["optimizer_bytes"]
    share = target.count / target.chips  # devices of a chip
    bounds = {
        "operations": result["operations"] / (target.chips * chip.peak),
        # Parameters are read and written, moments too, and gradients as large as the parameters are written and read.
        "memory": 2 * (state + result["parameter_bytes"]) * share / chip.bandwidth,
    }
    if chip.links:
        bounds["links"] = result["link_bytes"] * share / chip.links
    bound = max(bounds.values())
    at_share = max(bounds["operations"] / utilisation, bound)
    told |= {"seconds_at_least": bounds, "units_per_second_at_most": units / bound}
    for key, seconds in (("at_bound", bound), ("at_utilisation", at_share)):
        told[f"hours_{key}"] = seconds * steps / 3600
        told[f"chip_hours_{key}"] = seconds * steps / 3600 * target.chips
        if price is not None:
            told[f"price_{key}"] = told[f"chip_hours_{key}"] * price
    return told | {"utilisation": utilisation}


def _product(shape: list[int]) -> int:
    product = 1
    for side in shape:
        product *= side
    return product


def _shown(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the lines of the table."""

    def size(name: str) -> str:
        return "unknown" if result.get(name) is None else f"{result[name] / 1e9:,.2f} GB"

    fits = {True: "yes", False: "no", None: "unknown"}[result["fits"]]
    lines = {
        "mesh": ", ".join(f"{axis} {count}" for axis, count in result["mesh"].items()),
        "parameters": f"{result['parameters']:,}",
        "a device: parameters": size("parameter_bytes"),
        "a device: optimizer": size("optimizer_bytes"),
        "a device: temporaries": size("temporary_bytes") if result["compiled"] else "not compiled",
        "a device: peak": size("peak_bytes"),
        "a device: memory": size("memory_bytes"),
        "fits": fits,
    }
    if result["fits"] is False:
        remedy = result["remedy"]
        lines["would fit with"] = "nothing that was tried" if remedy is None else _changes(remedy)
    lines["operations a step"] = f"{result['operations']:.3g} (3 x the forward pass; attention whole)"
    for name, seconds in result.get("seconds_at_least", {}).items():
        lines[f"a step takes at least, by {name}"] = f"{seconds * 1000:,.1f} ms"
    if "hours_at_bound" in result:
        lines[f"{result['unit']} a second at most"] = f"{result['units_per_second_at_most']:,.0f}"
        lines["steps"] = f"{result['steps']:,}"
        lines["hours at the bound"] = _hours(result, "at_bound")
        lines[f"hours at {result['utilisation']:.0%} of the peak"] = _hours(result, "at_utilisation")
    if "tokens" in result:
        lines["tokens"] = f"{result['tokens']:.3g} (compute-optimal: {result['compute_optimal_tokens']:.3g})"
    if "published" in result:
        lines["published"] = json.dumps(result["published"])
    if result["compiled"]:
        lines["compiled in"] = duration(result["compile_seconds"])
    known = result["assumed"]
    lines["assumed"] = f"{known['num_steps']:,} steps; batches of " + ", ".join(
        f"{name} {x['shape'][1:]}" for name, x in known["spec"].items() if name != "mask"
    )
    return lines


def _changes(remedy: Mapping[str, Any]) -> str:
    changes = ", ".join(f"{key}={value}" for key, value in remedy["changes"].items())
    return f"{changes} ({remedy['peak_bytes'] / 1e9:,.2f} GB)"


def _hours(result: Mapping[str, Any], key: str) -> str:
    text = f"{result[f'hours_{key}']:,.1f} ({result[f'chip_hours_{key}']:,.0f} of chips)"
    return text + (f", price {result[f'price_{key}']:,.0f}" if f"price_{key}" in result else "")
