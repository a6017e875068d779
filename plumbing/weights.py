"""Weights and config.json of a Hugging Face folder: read strictly, written as safetensors.
"""

import json
import zipfile
from pathlib import Path

import torch
from torch import nn
from plumbing.files import named, read_json, whole


def read_config(folder: Path, families) -> dict:
    """config.json as a dict, with the defaults that its file leaves out filled in by transformers. ValueError
    for a `model_type` outside `families`: another family's weights often fit by shape and compute
    nonsense."""
    from transformers import AutoConfig  # imported late: it takes seconds, and only loading needs it
    config = read_json(folder / "config.json")
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in families:
        raise ValueError(f"{folder}: model_type is {family!r}; known here: {', '.join(families)}")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
    except Exception as error:  # transformers raises several kinds for a field of the wrong type
        raise ValueError(f"{folder}/config.json: {' '.join(str(error).split())}") from None


def config_from_dict(config_class, values: dict, folder):
    """The dataclass, from those of `values` that are set and that it has a field for."""
    known = {name: values[name] for name in config_class.__dataclass_fields__ if values.get(name) is not None}
    with named(folder):
        config = config_class(**known)
    for name, value in known.items():
        kind = config_class.__dataclass_fields__[name].type
        kind = {tuple: list | tuple, float: int | float}.get(kind, kind)
        is_count = name.startswith("num_") or name.endswith("_size")
        is_right = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
        if not is_right or (is_count and not 0 < value < 2**31):
            raise ValueError(f"{folder}: {name} is {value!r:.60}")
    return config


def read_weights(folder: Path):
    """Yield (name, tensor) of every weight in a Hugging Face folder, one shard in memory at a time, of
    `model.safetensors` or `pytorch_model.bin` (with `weights_only=True`), whole or in shards."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, whole = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if index.exists():
            places = read_json(index)
            if not isinstance(places, dict) or not isinstance(places.get("weight_map"), dict):
                raise ValueError(f"{index}: has no weight_map, which says where each tensor is")
            for shard in sorted(set(map(str, places["weight_map"].values()))):
                if Path(shard).name != shard:
                    raise ValueError(f"{index}: names {shard!r}, which is no file beside it")
                yield from read_shard(folder / shard)
            return
        if whole.exists():
            yield from read_shard(whole)
            return
    raise FileNotFoundError(f"{folder}: holds neither model.safetensors nor pytorch_model.bin")


def read_shard(path: Path):
    """Yield (name, tensor) of one .safetensors or .bin file; ValueError names a damaged one."""
    from safetensors import safe_open
    if not path.exists():
        raise FileNotFoundError(f"{path}: this shard of the weights is missing")
    try:
        if path.suffix == ".bin":
            is_mapped = zipfile.is_zipfile(path)  # before 2020 it was a pickle alone, which is read whole
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
            if not all(isinstance(name, str) for name in tensors):
                raise ValueError("it does not name its tensors")
            yield from tensors.items()
            return
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
    except Exception as error:  # both readers raise many kinds for a file cut short
        raise ValueError(f"{path}: not a file of weights ({type(error).__name__}: {error})") from None


def load_strictly(module: nn.Module, tensors, source, dtype=torch.float32, device="cpu", rename=str):
    """Set every parameter of `module` (built on the meta device) from (name, tensor) pairs, and return it.
    `rename` gives our name of a tensor, or "" for one that we compute or do not need.

    Strict both ways: a tensor without a parameter, a parameter without a tensor and a shape that differs are
    each a ValueError naming it and `source`. A head left random because its name was new costs a training
    run.
    """
    kind, wanted = type(module).__name__, {name: p.shape for name, p in module.named_parameters()}
    for theirs, tensor in tensors:
        name = rename(theirs)
        if not name:
            continue
        if name not in wanted:
            raise ValueError(f"{source}: {theirs!r} has no place in {kind}, or came twice")
        if tensor.shape != wanted[name]:
            shapes = f"{tuple(tensor.shape)}, {kind} needs {tuple(wanted[name])}"
            raise ValueError(f"{source}: {theirs} has shape {shapes}")
        if not tensor.is_floating_point():  # quantised: without its scales it is another weight
            raise ValueError(f"{source}: {theirs} holds {tensor.dtype}, not floating-point numbers")
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor.to(device, dtype)))
        del wanted[name]
    if wanted:
        raise ValueError(f"{source}: {len(wanted)} tensors missing, the first is {next(iter(wanted))!r}")
    return module


def write_weights(tensors: dict, folder, config: dict | None = None, file: str = "model.safetensors"):
    """Write {name: tensor} into `folder` as safetensors, and `config`, if given, as config.json."""
    from safetensors.torch import save_file
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole(folder / file) as building:
        save_file(weights, building, {"format": "pt"})
    if config is not None:
        with whole(folder / "config.json") as building:
            building.write_text(json.dumps(config, indent=2) + "\n")
