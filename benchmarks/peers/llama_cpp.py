"""llama.cpp: a control vector by `llama_set_adapter_cvec`, on a float32 GGUF model with a float32 cache.

The file is read as `common_control_vector_load` of llama.cpp reads it: the vector of block n stands at (n - 1) * width, block 0 has none.
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import torch
from gguf import GGUFReader
from llama_cpp_py_sync import Llama
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

DISTRIBUTIONS = ("llama-cpp-py-sync", "gguf")


class Arm:
    def __init__(self, model, tokenizer):
        config = model.config
        self.layers, self.width, self.vocabulary = config.num_hidden_layers, config.hidden_size, config.vocab_size

    @contextmanager
    def applied(self, setting):
        self.llama = Llama(setting["model"], n_ctx=256, n_threads=1, flash_attn_type=0, type_k="f32", type_v="f32")
        table = np.zeros((self.layers - 1, self.width), dtype=np.float32)
        for tensor in GGUFReader(setting["control_vector"]).tensors:
            table[int(tensor.name.removeprefix("direction.")) - 1] = tensor.data
        data = get_ffi().from_buffer("float[]", table)
        status = get_lib().llama_set_adapter_cvec(self.llama._ctx, data, table.size, self.width, 1, self.layers)
        if status:
            raise RuntimeError(f"llama_set_adapter_cvec returned {status}")
        yield

    def forward(self, ids):
        """Logits of the last token, [1, 1, vocabulary]."""
        ffi, lib = get_ffi(), get_lib()
        tokens = ffi.new("llama_token[]", ids[0].tolist())
        status = lib.llama_decode(self.llama._ctx, lib.llama_batch_get_one(tokens, ids.shape[1]))
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = ffi.buffer(lib.llama_get_logits_ith(self.llama._ctx, -1), 4 * self.vocabulary)
        return torch.from_numpy(np.frombuffer(bytes(logits), dtype=np.float32).copy())[None, None]
