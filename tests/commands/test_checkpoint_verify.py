"""A whole checkpoint verifies; each way of breaking one is named with its component."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from checkpoints.__main__ import main
from checkpoints.layout import CLASSES, WEIGHTS, belongs
from checkpoints.verification import read_shapes, verify
from project import ROOT

SCRIPT = ROOT / "scripts" / "checkpoint"


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "tiny"))


def weights_of(checkpoint: Path, component: str) -> Path:
    return checkpoint / component / f"{WEIGHTS[component]}.safetensors"


def change_config(checkpoint: Path, component: str, change: Callable[[dict[str, object]], object]) -> None:
    path = checkpoint / component / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def shard(path: Path) -> None:
    """Splits one safetensors file into two and an index, as large checkpoints come."""
    tensors = load_file(path)
    keys = sorted(tensors)
    placed = {}
    for number, part in enumerate((keys[::2], keys[1::2]), start=1):
        name = f"{path.stem}-{number:05}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, path.with_name(name))
        placed |= dict.fromkeys(part, name)
    path.with_name(f"{path.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    path.unlink()


def test_whole_checkpoint_has_no_faults(tiny_checkpoint: Path) -> None:
    assert verify(tiny_checkpoint) == []


def test_command_says_ok_or_one_line_per_fault(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(checkpoint)]) == 0
    assert capsys.readouterr().out == f"OK: {checkpoint}\n"
    shutil.rmtree(checkpoint / "vae")
    (checkpoint / "unet" / "config.json").unlink()
    broken = subprocess.run([SCRIPT, "verify", checkpoint], capture_output=True, text=True, check=False)
    assert broken.returncode == 1
    assert [line.partition(":")[0] for line in broken.stdout.splitlines()] == ["unet", "vae"]


def test_directory_without_an_index(tmp_path: Path) -> None:
    (fault,) = verify(tmp_path)
    assert str(fault) == "model_index.json: model_index.json is missing"


@pytest.mark.parametrize("component", CLASSES)
def test_missing_component_is_named(checkpoint: Path, component: str) -> None:
    shutil.rmtree(checkpoint / component)
    assert component in {fault.component for fault in verify(checkpoint)}


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize("kept", [0, 5, 200, -1], ids=["empty", "no header", "half a header", "one byte less"])
def test_truncated_weights(checkpoint: Path, component: str, kept: int) -> None:
    path = weights_of(checkpoint, component)
    path.write_bytes(path.read_bytes()[:kept])
    (fault,) = verify(checkpoint)
    assert fault.component == component
    assert "not a complete safetensors file" in fault.message


@pytest.mark.parametrize(
    ("component", "key"),
    [
        ("unet", "conv_in.weight"),
        ("vocoder", "conv_pre.bias"),
        ("language_model", "transformer.wpe.weight"),
        ("text_encoder", "text_projection.linear1.weight"),
    ],
)
def test_wrong_shape_and_missing_tensor(checkpoint: Path, component: str, key: str) -> None:
    path = weights_of(checkpoint, component)
    tensors = load_file(path)
    shape = list(tensors[key].shape)
    save_file(tensors | {key: tensors[key][:-1].clone()}, path)
    (fault,) = verify(checkpoint)
    assert fault.component == component
    assert f"got the shape {[shape[0] - 1, *shape[1:]]} but expected {shape}" in fault.message
    del tensors[key]
    save_file(tensors, path)
    (fault,) = verify(checkpoint)
    assert fault.component == component
    assert "lacks" in fault.message


def test_config_of_another_size(checkpoint: Path) -> None:
    change_config(checkpoint, "unet", lambda config: config.update(layers_per_block=3))
    assert {fault.component for fault in verify(checkpoint)} == {"unet"}


@pytest.mark.parametrize(
    ("component", "key"),
    [("unet", "cross_attention_dim"), ("language_model", "max_new_tokens"), ("vocoder", "sampling_rate")],
)
def test_missing_config_key(checkpoint: Path, component: str, key: str) -> None:
    change_config(checkpoint, component, lambda config: config.pop(key))
    (fault,) = verify(checkpoint)
    assert fault.component == component
    assert repr(key) in fault.message


def test_pickles_do_not_count_as_weights(checkpoint: Path) -> None:
    path = weights_of(checkpoint, "vae")
    path.with_suffix(".bin").write_bytes(b"pickle")
    assert verify(checkpoint) == []  # beside the real ones: never read
    path.unlink()
    (fault,) = verify(checkpoint)
    assert fault.component == "vae"
    assert "diffusion_pytorch_model.bin" in fault.message


def test_shards(checkpoint: Path) -> None:
    for component in ("unet", "text_encoder_2"):
        shard(weights_of(checkpoint, component))
    assert verify(checkpoint) == []
    (checkpoint / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    (fault,) = verify(checkpoint)
    assert fault.component == "unet"
    assert "00002-of-00002" in fault.message


def test_shards_read_as_the_whole(checkpoint: Path) -> None:
    path = weights_of(checkpoint, "unet")
    whole = read_shapes(path.parent, path.stem)
    shard(path)
    assert read_shapes(path.parent, path.stem) == whole


def test_language_model_without_its_head_and_prefix(checkpoint: Path) -> None:
    """As on the hub: `GPT2Model`."""
    path = weights_of(checkpoint, "language_model")
    save_file({key.removeprefix("transformer."): tensor for key, tensor in load_file(path).items()}, path)
    index = json.loads((checkpoint / "model_index.json").read_text())
    index["language_model"] = ["transformers", "GPT2Model"]
    (checkpoint / "model_index.json").write_text(json.dumps(index))
    assert verify(checkpoint) == []


def test_keys_of_older_libraries(checkpoint: Path) -> None:
    text_encoder = weights_of(checkpoint, "text_encoder")
    tensors = load_file(text_encoder)
    del tensors["text_model.embeddings.token_type_ids"]
    save_file(tensors, text_encoder)
    vae = weights_of(checkpoint, "vae")
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = load_file(vae)
    for new, former in old.items():
        tensors = {key.replace(new, former): tensor for key, tensor in tensors.items()}
    save_file(tensors, vae)
    assert verify(checkpoint) == []


def test_class_that_the_server_does_not_know(checkpoint: Path) -> None:
    index = json.loads((checkpoint / "model_index.json").read_text())
    index["text_encoder_2"] = ["transformers", "BertModel"]
    (checkpoint / "model_index.json").write_text(json.dumps(index))
    (fault,) = verify(checkpoint)
    assert str(fault).startswith("text_encoder_2: got the class 'BertModel'")


def test_widths_that_do_not_meet(checkpoint: Path) -> None:
    change_config(checkpoint, "projection_model", lambda config: config.update(text_encoder_1_dim=50))
    messages = [str(fault) for fault in verify(checkpoint)]
    assert any("text_encoder_1_dim: got 50 but expected 48" in message for message in messages)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("model_index.json", True),
        ("unet/diffusion_pytorch_model.safetensors", True),
        ("unet/diffusion_pytorch_model-00001-of-00002.safetensors", True),
        ("unet/diffusion_pytorch_model.safetensors.index.json", True),
        ("tokenizer/merges.txt", True),
        ("tokenizer_2/spiece.model", True),
        ("unet/diffusion_pytorch_model.fp16.safetensors", False),
        ("unet/diffusion_pytorch_model.bin", False),
        ("text_encoder/flax_model.msgpack", False),
        ("audioldm2-full.safetensors", False),
        ("README.md", False),
        ("extra/config.json", False),
        ("unet/../config.json", False),
    ],
)
def test_what_belongs_to_a_checkpoint(path: str, expected: bool) -> None:
    assert belongs(path) is expected
