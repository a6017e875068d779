"""Weights and config.json of a Hugging Face folder: read strictly, written as safetensors.

Only plain tensors are unpickled.
"""

import json
import zipfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from plumbing.files import named, read_json, whole, write_json


def open_config(folder: Path) -> dict:
    """config.json as it is. ValueError if the folder holds an adapter, which would change the weights."""
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder}: a LoRA adapter; merge it first (PEFT's merge_and_unload)")
    config = read_json(folder / "config.json")
    return config if isinstance(config, dict) else {}


def read_config(folder: Path, families) -> dict:
    """config.json with transformers' defaults for what the file leaves out.

    ValueError if its model_type is not one of `families`: another family's weights often fit by shape and
    give garbage.
    """
    config = open_config(folder)
    family = config.pop("model_type", None)
    if is_llavas_own(family, config):
        family = family.partition("_")[2] or "llama"  # llava_mistral
    if family not in families:
        raise ValueError(f"{folder}: model_type is {family!r}; known here: {', '.join(families)}")
    try:
        return with_defaults(family, json.dumps(config)).to_dict()
    except Exception as error:  # transformers raises several kinds for a field of the wrong type
        raise ValueError(f"{folder}/config.json: {' '.join(str(error).split())}") from None


@lru_cache(4)  # one config.json is read three times for a LLaVA, and transformers is slow at it
def with_defaults(family: str, fields: str):
    """transformers' configuration of these fields, in JSON."""
    from transformers import AutoConfig  # imported late: it takes seconds, and only loading needs it
    return AutoConfig.for_model(family, **json.loads(fields))


def is_llavas_own(family, config: dict) -> bool:
    """Whether this is the config.json of LLaVA's own form: an LLM's, with more fields."""
    return str(family).startswith("llava") and "text_config" not in config


def refuse_others(config: dict, known: dict, source):
    """ValueError that names the first field whose value is not one that we compute. A field may be absent."""
    for name, values in known.items():
        value = config.get(name)
        if value is not None and value not in values:
            wanted = " or ".join(map(repr, values))
            raise ValueError(f"{source}: {name} is {value!r:.60}; only {wanted} is supported")


def config_from_dict(config_class, values: dict, folder):
    """A `config_class` (a dataclass) of those values that are set and that it has a field for.

    ValueError if a value does not have its field's type, or if a count is not positive.
    """
    fields = config_class.__dataclass_fields__
    known = {name: values[name] for name in fields if values.get(name) is not None}
    with named(folder):
        config = config_class(**known)
    for name, value in known.items():
        if not fits(name, value, fields[name].type):
            raise ValueError(f"{folder}: {name} is {value!r:.60}")
    return config


def fits(name: str, value, kind) -> bool:
    """Whether a value from JSON may stand in a field of this name and type."""
    if isinstance(value, bool) or kind is bool:  # in Python True is an int, too
        return isinstance(value, bool) and kind is bool
    if name.startswith("num_") or name.endswith("_size"):
        return isinstance(value, kind) and 0 < value < 2**31
    if kind is float:
        return isinstance(value, (int, float))
    if kind is tuple:
        return isinstance(value, (list, tuple))
    return isinstance(value, kind)


def read_weights(folder: Path, wanted=bool):
    """Yield (name, tensor) of every weight in a folder of which `wanted(name)` is true, with one shard in
    memory at a time."""
    files = files_of(folder)
    if not files:
        raise FileNotFoundError(f"{folder}: holds neither model.safetensors nor pytorch_model.bin")
    for file in files:
        yield from read_shard(file, wanted)


def files_of(folder: Path) -> list:
    """model.safetensors or pytorch_model.bin, whole or in shards that an index lists. If a folder has several
    of these, transformers and we take the first."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        if (folder / f"{name}.index.json").exists():
            return shards_of(folder / f"{name}.index.json")
    return []


def shards_of(index: Path) -> list:
    """The files that an index lists, all of them in its folder."""
    places = read_json(index)
    if not isinstance(places, dict) or not isinstance(places.get("weight_map"), dict):
        raise ValueError(f"{index}: has no weight_map, which says where each tensor is")
    names = sorted({str(name) for name in places["weight_map"].values()})
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index}: names {name!r}, which is no file beside it")
    return [index.parent / name for name in names]


def read_shard(path: Path, wanted=bool):
    """The same of one .safetensors or .bin file."""
    from safetensors import safe_open
    if not path.exists():
        raise FileNotFoundError(f"{path}: this shard of the weights is missing")
    try:
        if path.suffix == ".bin":
            can_map = zipfile.is_zipfile(path)  # before 2020 such a file was one pickle
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=can_map)
            if not all(isinstance(name, str) for name in tensors):
                raise ValueError("it does not name its tensors")
            yield from ((name, tensors[name]) for name in tensors if wanted(name))
            return
        with safe_open(path, framework="pt") as file:
            yield from ((name, file.get_tensor(name)) for name in file.keys() if wanted(name))
    except Exception as error:  # both readers raise many kinds for a file cut short
        raise ValueError(f"{path}: not a file of weights ({type(error).__name__}: {error})") from None


def load_strictly(module: nn.Module, tensors, source, dtype=torch.float32, device="cpu", our_name=str):
    """Set every parameter of `module` (built on the meta device) from (their name, tensor) pairs.

    `our_name` gives our name of a tensor, or "" to leave it out. ValueError for a tensor without a parameter,
    a parameter without a tensor, a shape that differs, and two different tensors of one name: a head that
    stayed random because its name was new would cost a training run.
    """
    kind = type(module).__name__
    loaded = {}
    missing = {name: parameter.shape for name, parameter in module.named_parameters()}
    for theirs, tensor in tensors:
        name = our_name(theirs)
        if not name:
            continue
        if name in loaded and torch.equal(loaded[name], tensor.to(loaded[name])):
            continue
        if name not in missing:
            if name in loaded:
                raise ValueError(f"{source}: two different tensors for {name!r}; where one is a head of "
                                 "its own, tie_word_embeddings in config.json must be false")
            raise ValueError(f"{source}: {theirs!r} has no place in {kind}")
        if tensor.shape != missing[name]:
            raise ValueError(f"{source}: {theirs} has shape {tuple(tensor.shape)}, "
                             f"{kind} needs {tuple(missing[name])}")
        if not tensor.is_floating_point():  # quantised: without its scales it is another weight
            raise ValueError(f"{source}: {theirs} holds {tensor.dtype}, not floating-point numbers")
        owner, _, leaf = name.rpartition(".")
        loaded[name] = nn.Parameter(tensor.to(device, dtype))
        setattr(module.get_submodule(owner), leaf, loaded[name])
        del missing[name]
    if missing:
        raise ValueError(f"{source}: {len(missing)} tensors missing, the first is {next(iter(missing))!r}")


def write_weights(tensors: dict, folder, config: dict | None = None, file: str = "model.safetensors"):
    """Write {name: tensor} into `folder` as safetensors, and then `config`, if given, as config.json."""
    from safetensors.torch import save_file
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole(folder / file) as building:
        save_file(weights, building, {"format": "pt"})
    if config is not None:
        write_json(folder / "config.json", config)
