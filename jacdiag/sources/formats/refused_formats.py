"""Formats that are recognised and not read: each is refused by name, with what to do instead."""

from __future__ import annotations

import zipfile
from pathlib import Path

from jacdiag.errors import SourceError

_TORCH_WAY = "audit the PyTorch checkpoint that it was made from"

# Suffix -> what it is, and the way out.
_BY_SUFFIX = {
    ".onnx": (
        "an ONNX graph",
        f"{_TORCH_WAY} (the file that torch.onnx.export was given the model of)",
    ),
    ".h5": ("an HDF5 file of Keras or TensorFlow", _TORCH_WAY),
    ".hdf5": ("an HDF5 file of Keras or TensorFlow", _TORCH_WAY),
    ".keras": ("a model of Keras", _TORCH_WAY),
    ".msgpack": ("a msgpack file of Flax", _TORCH_WAY),
    ".tflite": ("a model of TensorFlow Lite", _TORCH_WAY),
    ".pb": ("a graph of TensorFlow", _TORCH_WAY),
    ".engine": ("an engine of TensorRT", _TORCH_WAY),
    ".pdparams": ("a file of PaddlePaddle", _TORCH_WAY),
    ".mlmodel": ("a model of Core ML", _TORCH_WAY),
    ".nemo": ("an archive of NeMo", "unpack it (tar -xf), and audit the .ckpt in it"),
    ".mar": ("an archive of TorchServe", "unzip it, and audit the checkpoint in it"),
}
_ARCHIVES = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".tar", ".zip", ".7z", ".rar")
_TORCHSCRIPT = (".jit", ".ts", ".torchscript")

# First bytes.
_GGUF = (b"GGUF", b"ggml", b"ggjt", b"lmgg", b"tjgg")
_LFS = b"version https://git-lfs"
_WEB_PAGE = (b"<!doctype html", b"<html")
_HDF5 = b"\x89HDF\r\n\x1a\n"


def check_format(path: Path) -> None:
    """Raise if a file is in a format that jacdiag does not read, by its first bytes or its suffix.

    Args:
        path: a plain file that is not empty.

    Raises:
        SourceError: it is; the message names the format and the way out.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise SourceError(f"cannot read '{path}'", got=error.strerror) from error
    _check_head(path, head)
    _check_suffix(path)


def check_downloaded(path: Path, head: bytes) -> None:
    """Raise if a file holds a note or a web page in the place of what it is called.

    Args:
        path: the file.
        head: its first bytes.

    Raises:
        SourceError: it does; the message says how to get the file itself.
    """
    if head.startswith(_LFS):
        raise SourceError(
            f"'{path}' is a Git LFS pointer, not the file itself", hint="git lfs pull"
        )
    if head.lstrip().lower().startswith(_WEB_PAGE):
        raise SourceError(
            f"'{path}' is a web page, not the file itself",
            hint="the download was answered with a page: download it again, logged in if need be",
        )


def _check_head(path: Path, head: bytes) -> None:
    """Raise if the first bytes of a file are those of another format."""
    # 1. What is left by a download that failed.
    check_downloaded(path, head)

    # 2. Formats of other libraries.
    if head.startswith(_GGUF):
        raise _refused(
            path,
            "a GGUF or GGML file of llama.cpp",
            "audit the checkpoint that it was converted from; transformers turns many back: "
            f"from_pretrained(FOLDER, gguf_file='{path.name}').save_pretrained('checkpoint')",
        )
    # The length of a safetensors header can look like ONNX.
    if path.suffix != ".safetensors" and _is_onnx(head):
        raise _refused(path, *_BY_SUFFIX[".onnx"])
    if head.startswith(_HDF5):
        raise _refused(path, *_BY_SUFFIX[".h5"])
    if head[4:8] == b"TFL3":
        raise _refused(path, *_BY_SUFFIX[".tflite"])

    # 3. Arrays of NumPy, which torch can save.
    _check_arrays(path, head)


def _check_arrays(path: Path, head: bytes) -> None:
    """Raise if the first bytes of a file are those of arrays of NumPy."""
    # 1. One array.
    if head.startswith(b"\x93NUMPY"):
        way = f"torch.save({{'weight': torch.from_numpy(numpy.load('{path.name}'))}}, 'weights.pt')"
        raise _refused(path, "one array of NumPy", way)

    # 2. Several arrays, by name.
    is_zip = head.startswith(b"PK\x03\x04")
    if is_zip and _holds_arrays(path):
        way = (
            f"torch.save({{k: torch.from_numpy(v) for k, v in "
            f"numpy.load('{path.name}').items()}}, 'weights.pt')"
        )
        raise _refused(path, "an archive of NumPy arrays", way)


def _is_onnx(head: bytes) -> bool:
    """Return whether bytes begin as a ModelProto does: a version, then the producer's name.

    Source: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto, message ModelProto.
    """
    if len(head) <= 4:
        return False
    # field 1, a number: the version of the format
    has_version = head[0] == 0x08 and 1 <= head[1] <= 0x20
    # field 2 or 7: the producer's name, or the graph
    has_next_field = head[2] in (0x12, 0x3A)
    return has_version and has_next_field


def _holds_arrays(path: Path) -> bool:
    """Return whether a zip holds arrays of NumPy and nothing else."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    # damaged bytes may raise anything; the reader of torch files names the damage
    except Exception:
        return False
    if not names:
        return False
    return all(name.endswith(".npy") for name in names)


def _check_suffix(path: Path) -> None:
    """Raise if the name of a file is that of another format."""
    # 1. Formats with a suffix of their own.
    name, suffix = path.name, path.suffix
    if suffix in _TORCHSCRIPT:
        raise torchscript(path)
    if suffix == ".pt2":
        raise exported_program(path)
    if suffix in _BY_SUFFIX:
        raise _refused(path, *_BY_SUFFIX[suffix])

    # 2. Compressed files and archives, whatever is in them.
    if suffix in _ARCHIVES:
        raise _refused(
            path, "a compressed file or an archive", "unpack it, and name the checkpoint in it"
        )

    # 3. Parts of a checkpoint that are not its weights.
    if name.endswith(".index.json"):
        raise _refused(
            path, "the index of a checkpoint in shards", f"audit the folder: {path.parent}"
        )
    is_of_tensorflow = suffix == ".index" or ".data-0000" in name
    if is_of_tensorflow:
        raise _refused(path, "a part of a TensorFlow checkpoint", _TORCH_WAY)
    is_random_state = suffix == ".pkl" and name.startswith("random_states_")
    if is_random_state:
        way = "its weights are in model.safetensors or pytorch_model.bin of the same folder"
        raise _refused(path, "the random states of a run with accelerate", way)

    # 4. Formats that can hold weights, and are read from files of torch.save only.
    if suffix in (".pkl", ".pickle"):
        raise _refused(path, "a pickle", "save the state dict with torch.save, as a .pt file")
    if suffix in (".npz", ".npy"):
        raise _refused(path, "a file of NumPy", "save the weights with torch.save, as a .pt file")


def torchscript(path: Path) -> SourceError:
    """Return the error for a TorchScript archive."""
    way = (
        f"torch.save(torch.jit.load('{path.name}').state_dict(), 'weights.pt'), then weights.pt "
        "with --model FACTORY"
    )
    return SourceError(
        f"'{path}' is a TorchScript archive, which holds code besides weights", hint=way
    )


def exported_program(path: Path) -> SourceError:
    """Return the error for a program of torch.export."""
    way = (
        f"torch.save(torch.export.load('{path.name}').state_dict, 'weights.pt'), then weights.pt "
        "with --model FACTORY"
    )
    return _refused(path, "a program of torch.export", way)


def _refused(path: Path, what: str, way: str) -> SourceError:
    """Return the error for a file of a format that is not read."""
    return SourceError(f"'{path}' is {what}, which jacdiag does not read", hint=way)
