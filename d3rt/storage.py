"""A runtime in a folder: what Runtime.save writes and d3rt.load reads.

    d3rt.json                            this format's version, the widths, the policy and other options, the file names
    model.safetensors                    weights as the runtime keeps them, or model-00001-of-0000N and an index
    config.json, generation_config.json  Hugging Face's
    tokenizer.json and others            Hugging Face's, where the runtime has a tokenizer

Tensors have Hugging Face's parameter names; a packed matrix is three, <name>.data, .scales and .minima (if any), in the
layout of d3rt.kernels.packing. A tied lm_head is stored once, as the embedding. A folder is written under another name
beside its place and renamed, so that nobody ever sees half of one. Reading checks every name, shape and dtype before
the first tensor, and holds one tensor beside what the runtime keeps.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from d3rt.errors import D3rtError, ModelNotFoundError, PolicyError, SaveError, UnsupportedModelError
from d3rt.kernels.packing import FORMATS, PackedMatrix
from d3rt.models import family_of
from d3rt.models.loading import SETTINGS_FILE, quiet_transformers, tokenizer_in
from d3rt.models.source import check_shapes, parameters, skeleton
from d3rt.policies import Policy
from d3rt.quantize import KV_CACHE_WIDTHS, WIDTHS, Matrix, Width, Widths, packed_parts, parse_width

VERSION = 1
# As Hugging Face's: a file larger than this is split.
SHARD_BYTES = 5 * 10**9

# safetensors' names of the dtypes that are written.
_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class Settings:
    """What a runtime is besides its model: compile's arguments, as they came out."""

    widths: Widths
    policy: dict[str, Any]  # Policy.to_dict
    kv_fill: str
    max_seq_len: int
    batch_size: int

    def to_dict(self) -> dict[str, Any]:
        names = {name: str(getattr(self.widths, name)).removeprefix("torch.") for name in _WIDTHS}
        return names | {name: getattr(self, name) for name in _TYPES}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """ValueError or TypeError for what is missing or wrong."""
        for name, kind in _TYPES.items():
            if type(values.get(name)) is not kind:
                raise TypeError(f"{name}={values.get(name)!r}: it must be a {kind.__name__}")
        widths = {name: parse_width(name, values.get(name), choices) for name, choices in _WIDTHS.items()}
        return cls(Widths(**widths, load_dtype=None), **{name: values[name] for name in _TYPES})


_WIDTHS = {"weights": WIDTHS, "lm_head": WIDTHS, "kv_cache": KV_CACHE_WIDTHS}
_TYPES = {"policy": dict, "kv_fill": str, "max_seq_len": int, "batch_size": int}


@dataclass(frozen=True)
class Saved:
    """A folder that Runtime.save wrote, opened: every tensor's name, shape and dtype is right, and none is read yet."""

    folder: Path
    settings: Settings
    source: SavedSource

    def policy(self) -> Policy:
        """The policy that was saved; PolicyError when it cannot be made here."""
        try:
            return Policy.from_dict(self.settings.policy)
        except PolicyError as error:
            raise PolicyError(
                f"{str(self.folder / SETTINGS_FILE)!r}: {error} Import the module that defines the policy, or pass "
                "policy=."
            ) from error

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that was saved, or None."""
        return tokenizer_in(self.folder)


def is_saved(path: str | os.PathLike[str] | None) -> bool:
    """Whether there is a folder of that name that Runtime.save wrote."""
    return path is not None and (Path(path).expanduser() / SETTINGS_FILE).is_file()


# -- writing ---------------------------------------------------------------------------------------------------------


def save(
    folder: str | os.PathLike[str],
    settings: Settings,
    weights: Mapping[str, Matrix],
    hf_config: Any,
    generation_config: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Path:
    """Writes all of it as `folder` and returns its path; `weights` by Hugging Face's names, without a tied lm_head.

    SaveError when something is there that an earlier save did not write. Whatever goes wrong, the folder is as it was.
    """
    folder = Path(folder).expanduser().resolve()
    _check_target(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(folder)
    try:
        temporary.mkdir()
        _write_weights(temporary, weights)
        config = copy.deepcopy(hf_config)
        config.tie_word_embeddings = "lm_head.weight" not in weights
        # Not save_pretrained, which refuses a config that generates perfectly well but says something in vain.
        config.to_json_file(temporary / "config.json")
        generation_config.to_json_file(temporary / "generation_config.json")
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        files = sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file())
        values = {"format": "d3rt", "version": VERSION} | settings.to_dict() | {"files": files}
        (temporary / SETTINGS_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        _sync(temporary)
        _rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _sibling(folder: Path) -> Path:
    """A new name beside it, since only a rename within one file system is atomic."""
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")


def _check_target(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise SaveError(f"save({str(folder)!r}): it is a file; choose a folder that does not exist yet.")
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    try:
        ours = {SETTINGS_FILE, *_read_settings_file(folder)["files"]} if there else set()
    except D3rtError:
        ours = set()
    if strange := sorted(there - ours):
        raise SaveError(
            f"save({str(folder)!r}): the folder holds {strange[0]!r}, which no earlier save wrote; choose a folder "
            "that does not exist yet, or empty this one."
        )


def _write_weights(folder: Path, weights: Mapping[str, Matrix]) -> None:
    tensors = {
        part: tensor for name, matrix in weights.items() for part, tensor in _parts(name, matrix).items()
    }
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_BYTES)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _parts(name: str, matrix: Matrix) -> dict[str, Tensor]:
    """The tensors of one parameter by the names they are stored under."""
    if not isinstance(matrix, PackedMatrix):
        return {name: matrix}
    parts = {part: getattr(matrix, part) for part in ("data", "scales", "minima")}
    return {f"{name}.{part}": tensor for part, tensor in parts.items() if tensor is not None}


def _sync(folder: Path) -> None:
    """Has the disk hold the files before the rename says that they are there."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _rename(temporary: Path, folder: Path) -> None:
    """Puts `temporary` in the place of `folder`, whose earlier content goes; if that fails, it comes back."""
    if not folder.exists() or not any(folder.iterdir()):
        os.rename(temporary, folder)
        return
    earlier = _sibling(folder)
    try:
        os.rename(folder, earlier)
        os.rename(temporary, folder)
    except BaseException:
        if earlier.exists() and not folder.exists():
            os.rename(earlier, folder)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


# -- reading ---------------------------------------------------------------------------------------------------------


def open_saved(folder: str | os.PathLike[str]) -> Saved:
    """Opens what Runtime.save wrote, and reads no tensor yet.

    ModelNotFoundError for a folder or a file of it that is not there; UnsupportedModelError for one that something else
    wrote, that a later version wrote, or that is damaged.
    """
    folder = Path(folder).expanduser()
    values = _read_settings_file(folder)
    where = repr(str(folder / SETTINGS_FILE))
    try:
        settings = Settings.from_dict(values)
    except (TypeError, ValueError) as error:
        raise UnsupportedModelError(f"{where} is damaged: {error}; save it again.") from error
    if absent := [name for name in values["files"] if not (folder / name).is_file()]:
        raise ModelNotFoundError(
            f"{str(folder)!r} lacks {absent[0]!r}, which save wrote; copy or save it again."
        )
    try:
        with quiet_transformers():
            hf_config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
            generation_config = GenerationConfig.from_pretrained(str(folder))
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UnsupportedModelError(f"{str(folder)!r}: its configs cannot be read: {error}") from error
    family = family_of(hf_config)
    family.config(hf_config)  # refuses what is not supported
    model = skeleton(hf_config)
    model.generation_config = generation_config
    files = [folder / name for name in values["files"] if name.endswith(".safetensors")]
    widths = family.widths(model, settings.widths.weights, settings.widths.lm_head)
    return Saved(folder, settings, SavedSource(folder, files, model, widths))


def _read_settings_file(folder: Path) -> dict[str, Any]:
    """d3rt.json, of a version that is known, with its list of file names."""
    path = folder / SETTINGS_FILE
    if not folder.is_dir():
        raise ModelNotFoundError(f"{str(folder)!r}: no such folder; pass one that Runtime.save wrote.")
    if not path.is_file():
        raise ModelNotFoundError(
            f"{str(folder)!r} has no {SETTINGS_FILE}, so Runtime.save did not write it; models from elsewhere go "
            "through d3rt.compile(folder)."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != "d3rt" or type(values["version"]) is not int:
            raise ValueError("it does not say format 'd3rt' and a version")
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedModelError(f"{str(path)!r} is not what Runtime.save writes: {error!r}.") from error
    if not 1 <= values["version"] <= VERSION:
        raise UnsupportedModelError(
            f"{str(path)!r} is of version {values['version']}, and this d3rt reads versions up to {VERSION}: install a "
            "later d3rt, or save it again with this one."
        )
    files = values.get("files")
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        raise UnsupportedModelError(f"{str(path)!r} is damaged: files={files!r}; save it again.")
    return values


class SavedSource:
    """The weights of a saved runtime, each read into memory of its own when it is taken. `model` is on the meta device.

    Not left in the mapped files: memory of one's own can be had in large pages, and is aligned as kernels like it.
    UnsupportedModelError when files and config do not belong together.
    """

    def __init__(self, folder: Path, files: list[Path], model: torch.nn.Module, widths: Mapping[str, Width]):
        self.model = model
        self._shapes = {name: tuple(parameters(model)[name].shape) for name in widths}
        self._file_of: dict[str, Any] = {}
        found: dict[str, list[int]] = {}
        dtypes: dict[str, torch.dtype | None] = {}
        for path in files:
            try:
                file = safe_open(path, framework="pt")
                for name in file.keys():  # it is no mapping
                    self._file_of[name] = file
                    found[name] = file.get_slice(name).get_shape()
                    dtypes[name] = _DTYPES.get(file.get_slice(name).get_dtype())
            except (SafetensorError, OSError) as error:
                raise UnsupportedModelError(
                    f"{str(path)!r} is damaged: {error}; copy or save it again."
                ) from error
        expected: dict[str, tuple[int, ...]] = {}
        kept: dict[str, torch.dtype] = {}
        for name, width in widths.items():
            for part, (shape, dtype) in _layout(name, self._shapes[name], width).items():
                if part in found or not part.endswith(".minima"):
                    expected[part], kept[part] = shape, dtype
        check_shapes(repr(str(folder)), expected, found)
        for name, dtype in kept.items():
            if dtypes[name] is not dtype:
                raise UnsupportedModelError(
                    f"{str(folder)!r}: {name!r} is {dtypes[name]}, not {dtype} as {SETTINGS_FILE} says; save it again."
                )

    def take(self, name: str, width: Width) -> Matrix:
        if width not in FORMATS:
            return self._read(name)
        minima = f"{name}.minima"
        return PackedMatrix(
            width,
            *self._shapes[name],
            self._read(f"{name}.data"),
            self._read(f"{name}.scales"),
            self._read(minima) if minima in self._file_of else None,
        )

    def _read(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name).clone()


def _layout(
    name: str, shape: tuple[int, ...], width: Width
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor that a parameter of that shape, kept in that width, may be stored as."""
    if width not in FORMATS:
        return {name: (shape, width)}
    return {f"{name}.{part}": expected for part, expected in packed_parts(width, *shape).items()}
