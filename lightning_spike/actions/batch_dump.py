"""Write and read a batch as a folder: tensors as safetensors, everything else as JSON.

```
step000123_epoch2_batch17_rank0/
    manifest.json         structure, leaves and their statistics, random states, facts of the writer
    tensors.safetensors   the tensors: batch/<path>, random/torch, random/<device>
```

Both files are readable without this package. In the manifest, numbers that JSON does not have are the strings "nan",
"inf" and "-inf".
"""

import base64
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_spike.files import whole_folder
from lightning_spike.signals.batch import children
from lightning_spike.signals.random_state import RandomState
from lightning_spike.signals.subset import is_plain

FORMAT: Final = "lightning_spike.batch"
FORMAT_VERSION: Final = 1
MANIFEST: Final = "manifest.json"
TENSORS: Final = "tensors.safetensors"

MAX_REPR_LENGTH: Final = 2000
"""Characters of the `repr` of an object without another form; engineering choice."""

MAX_DEPTH: Final = 64
"""Levels of nesting, which end a recursive structure in a repr; engineering choice."""

SAFETENSORS_DTYPES: Final = frozenset(
    getattr(torch, name)
    for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
)
"""Dtypes of every allowed version of safetensors; complex tensors become pairs of reals."""

Node = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """Placeholder of an object that could not be written."""

    class_name: str
    repr: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadedDump:
    """A batch from disk."""

    batch: Any
    """In its structure of dicts, lists, tuples, None, strings, numbers, numpy arrays and tensors (on the CPU). Other
    mappings and dataclasses are dicts, namedtuples are tuples, any other object is `Unreadable`."""
    random: RandomState
    """State before the batch's forward pass."""
    manifest: Mapping[str, Any]
    """All of manifest.json."""


def write_dump(path: Path, *, batch: object, random: RandomState, facts: Mapping[str, Any]) -> int:
    """Write a batch into the folder `path`, completely or not at all; replaces an earlier dump. Blocks.

    Args:
        path: The folder to make, with its parents.
        batch: Any output of a loader.
        random: The random states.
        facts: JSON-able entries for the manifest.

    Returns:
        Bytes written.

    Raises:
        OSError: It could not be written.
    """
    tensors: dict[str, Tensor] = {}
    structure = _encode(batch, "batch", tensors, MAX_DEPTH)
    tensors["random/torch"] = _on_host(random.torch)
    tensors |= {f"random/{device}": _on_host(state) for device, state in random.devices.items()}
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **facts,
        "structure": structure,
        "random": {"python": _jsonable(random.python), "numpy": _jsonable(random.numpy)},
    }
    with whole_folder(path) as folder:
        save_file(tensors, folder / TENSORS)
        (folder / MANIFEST).write_text(json.dumps(_jsonable(manifest), indent=1, allow_nan=False), encoding="utf-8")
        return sum(file.stat().st_size for file in folder.iterdir())


def load_dump(path: str | Path) -> LoadedDump:
    """Read a dump back.

    Args:
        path: The dump's folder.

    Raises:
        FileNotFoundError: There is no dump.
        ValueError: The folder holds something else, or a dump of another version.
    """
    folder = Path(path)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    found = (manifest.get("format"), manifest.get("format_version"))
    if found != (FORMAT, FORMAT_VERSION):
        msg = f"{folder}: expected format {FORMAT!r}, version {FORMAT_VERSION}; found {found[0]!r}, {found[1]!r}"
        raise ValueError(msg)
    tensors = load_file(folder / TENSORS)
    devices = {
        name.removeprefix("random/"): state
        for name, state in tensors.items()
        if name.startswith("random/") and name != "random/torch"
    }
    random = RandomState(
        python=_python_state(manifest["random"]["python"]),
        numpy=_numpy_state(manifest["random"]["numpy"]),
        torch=tensors["random/torch"],
        devices=devices,
    )
    return LoadedDump(batch=_decode(manifest["structure"], tensors), random=random, manifest=manifest)


def tensor_bytes(batch: object, depth: int = MAX_DEPTH) -> int:
    """Bytes of all tensors and arrays in a batch, about the size of its dump."""
    if isinstance(batch, Tensor):
        return batch.numel() * batch.element_size()
    if isinstance(batch, np.ndarray):
        return batch.nbytes
    return sum(tensor_bytes(item, depth - 1) for _, item in (children(batch) if depth else None) or [])


def content_hash(tensors: Iterable[Tensor]) -> str:
    """Hexadecimal SHA-256 over dtypes, shapes and bytes of tensors in order. Blocks."""
    digest = hashlib.sha256()
    for tensor in tensors:
        host = _on_host(tensor)
        digest.update(f"{host.dtype}{tuple(host.shape)}".encode())
        digest.update(host.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _encode(value: object, path: str, tensors: dict[str, Tensor], depth: int) -> Node:
    """One node of the structure; adds tensors to `tensors` under their path."""
    if isinstance(value, Tensor):
        return _encode_tensor(value, path, tensors)
    if isinstance(value, (np.ndarray, np.generic)):
        return _encode_array(value, path, tensors)
    if isinstance(value, float):
        return {"kind": "float", "value": value if math.isfinite(value) else str(value)}
    if value is None or isinstance(value, (bool, int, str)):
        return {"kind": "value", "value": value}
    if isinstance(value, bytes):
        return {"kind": "bytes", "base64": base64.b64encode(value).decode("ascii")}
    return _encode_container(value, path, tensors, depth) if depth else _encode_repr(value)


def _encode_container(value: object, path: str, tensors: dict[str, Tensor], depth: int) -> Node:
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{path}.{k}", tensors, depth - 1) for k, item in enumerate(value)]
        return {"kind": "list" if isinstance(value, list) else "tuple", "class": _class(value), "items": items}
    held = value.items() if isinstance(value, Mapping) else children(value)
    if held is None:
        return _encode_repr(value)
    pairs = [[_encode(key, path, {}, 0), _encode(item, f"{path}.{key}", tensors, depth - 1)] for key, item in held]
    return {"kind": "dict", "class": _class(value), "items": pairs}


def _encode_repr(value: object) -> Node:
    return {"kind": "repr", "class": _class(value), "repr": _short_repr(value)}


def _encode_tensor(value: Tensor, path: str, tensors: dict[str, Tensor]) -> Node:
    """A plain tensor by its values, any other by its repr."""
    dtype = torch.float32 if value.is_complex() else value.dtype
    if not is_plain(value) or dtype not in SAFETENSORS_DTYPES:
        return _encode_repr(value)
    return _keep(_on_host(value), path, tensors, "tensor")


def _encode_array(value: np.ndarray[Any, Any] | np.generic, path: str, tensors: dict[str, Tensor]) -> Node:
    try:
        host = torch.from_numpy(np.array(value))
    except TypeError:  # strings, objects, dates
        return _encode_repr(value)
    kind = "array" if isinstance(value, np.ndarray) else "scalar"
    return _keep(host, path, tensors, kind) if host.dtype in SAFETENSORS_DTYPES else _encode_repr(value)


def _keep(host: Tensor, path: str, tensors: dict[str, Tensor], kind: str) -> Node:
    key = path
    while key in tensors:  # {"a.b": x, "a": {"b": y}}
        key += "'"
    is_complex = host.is_complex()
    tensors[key] = torch.view_as_real(host).contiguous() if is_complex else host
    return {"kind": kind, "key": key, "complex": is_complex}


def _on_host(tensor: Tensor) -> Tensor:
    """A copy on the host: safetensors refuses shared memory, and the training writes the original."""
    plain = tensor.detach().as_subclass(Tensor).cpu().resolve_conj().resolve_neg()
    return plain.clone(memory_format=torch.contiguous_format)


def _decode(node: Node, tensors: Mapping[str, Tensor]) -> Any:
    value: Any
    match node["kind"]:
        case "value":
            value = node["value"]
        case "float":
            value = float(node["value"])
        case "bytes":
            value = base64.b64decode(node["base64"])
        case "list":
            value = [_decode(item, tensors) for item in node["items"]]
        case "tuple":
            value = tuple(_decode(item, tensors) for item in node["items"])
        case "dict":
            value = {_decode(key, tensors): _decode(item, tensors) for key, item in node["items"]}
        case "repr":
            value = Unreadable(class_name=node["class"], repr=node["repr"])
        case _:
            value = _decode_tensor(node, tensors)
    return value


def _decode_tensor(node: Node, tensors: Mapping[str, Tensor]) -> Any:
    """A tensor, an array or its scalar."""
    stored = tensors[node["key"]]
    value = torch.view_as_complex(stored) if node["complex"] else stored
    if node["kind"] == "tensor":
        return value
    return value.numpy() if node["kind"] == "array" else value.numpy()[()]


def _class(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _short_repr(value: object) -> str:
    try:
        return repr(value)[:MAX_REPR_LENGTH]
    except Exception as error:  # noqa: BLE001 - a user's repr can raise anything
        return f"<repr raised {type(error).__name__}>"


def _jsonable(value: object) -> Any:
    """The same in JSON types; other objects by their repr."""
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return _short_repr(value)


def _python_state(state: list[Any]) -> tuple[Any, ...]:
    version, words, gauss = state
    return version, tuple(words), gauss


def _numpy_state(state: list[Any]) -> tuple[Any, ...]:
    name, words, *rest = state
    return (name, np.array(words, dtype=np.uint32), *rest)
